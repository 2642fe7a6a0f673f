// Products: their policies and platform keys. A key is shown once, and stays until it is put away by hand.

import { call, get } from "../api.js";
import { confirmed } from "../dialog.js";
import { copyButton, h, keyed, note } from "../dom.js";
import { ago, integer, when } from "../format.js";
import { remembered } from "./overview.js";

// Outside of any page: no live event, refresh or change of page may take a key away that nobody can show again.
const shownOnce = h("div.keys-shown", { "aria-live": "polite" });

function showKey(what, key) {
  const panel = h("section.card.once", { "aria-label": "New platform key" },
    h("h3", {}, what), h("p", {}, "Store it now: it is shown only here, and cannot be shown again."),
    h("div.key", {}, h("code", { tabindex: "0" }, key), copyButton(key)),
    h("button", { type: "button", onclick: () => panel.remove() }, "I have stored it"));
  shownOnce.append(panel);
  panel.querySelector("code").focus();
}

/** When the page is locked, nothing secret stays. */
export function forgetKeys() {
  shownOnce.replaceChildren();
}

export function productsPage(openId) {
  const list = h("div.stack");
  const empty = h("p.empty", { hidden: true }, "No product is registered.");
  const element = h("div.page", {},
    h("div.head", {}, h("h1", {}, "Products"), h("span.space"),
      h("button.primary", { type: "button", onclick: register }, "Register a product")),
    shownOnce, list, empty);

  async function refresh() {
    const { products } = await get("/products");
    const rows = await Promise.all(products.map(async (product) => {
      const { keys } = await get(`/products/${product.product_id}/keys`);
      return { ...product, keys: keys.map((key) => ({ ...key, used: key.last_used_at ? ago(key.last_used_at) : "never" })) };
    }));
    keyed(list, rows, (product) => product.product_id, card);
    empty.hidden = products.length > 0;
  }

  const card = (product) => h("section.card.product", { "aria-label": product.display_name, dataset: { open: String(product.product_id === openId) } },
    h("div.head", {}, h("h2", {}, product.display_name), h("code", {}, product.slug),
      h("a", { href: `#/engines?product=${product.product_id}` }, `${integer(product.engines)} ${product.engines === 1 ? "engine" : "engines"}`), h("span.space"),
      button("Policy", () => policy(product)), button("New key", () => issue(product)),
      button("Rotate", () => rotate(product)), button("Delete", () => remove(product), "danger")),
    h("p", {}, Object.keys(product.policy).length
      ? Object.entries(product.policy).map(([name, value]) => h("span.pair", {}, h("span.muted", {}, `${name} `),
        typeof value === "object" ? JSON.stringify(value) : String(value)))
      : h("span.muted", {}, "No limits.")),
    h("table", {}, h("thead", {}, h("tr", {}, ["Key", "Scopes", "Created", "Last used", "Expires", ""].map((name) =>
      h("th", { scope: "col" }, name)))), h("tbody", {}, product.keys.map((key) => h("tr", {},
      h("td", { dataset: { label: "Key" } }, h("code", { title: key.key_id }, key.key_id.slice(0, 8))),
      h("td", { dataset: { label: "Scopes" } }, key.scopes.join(", ")),
      h("td", { dataset: { label: "Created" } }, when(key.created_at)),
      h("td", { dataset: { label: "Last used" } }, key.used),
      h("td", { dataset: { label: "Expires" } }, key.expires_at ? when(key.expires_at) : "never"),
      h("td", {}, button("Revoke", () => revoke(product, key), "danger", `revoke-${key.key_id}`)))))),
    product.keys.length ? null : h("p.empty", {}, "No key: nobody can call for this product."));

  const button = (text, onclick, kind = "", place = text) =>
    h(kind ? `button.small.${kind}` : "button.small", { type: "button", onclick, dataset: { place } }, text);

  const path = (product) => `/products/${product.product_id}`;
  const after = async (done, text) => {
    if (!done) return;
    if (text) note(text);
    await refresh().catch((error) => note(error.message, "error"));
  };

  async function register() {
    const done = await confirmed({
      title: "Register a product", verb: "Register",
      fields: {
        slug: { label: "Slug", element: h("input", { required: true, pattern: "[a-z0-9][a-z0-9\\-]{0,62}", autocomplete: "off" }), hint: "lower case letters, digits and -" },
        display_name: { label: "Name", element: h("input", { required: true, autocomplete: "off" }) },
        policy: { label: "Policy", element: area("{}"), hint: "JSON; {} sets no limits" },
      },
      act: (values) => call("POST", "/products/register", { body: { ...values, policy: parsed(values.policy) } }),
    });
    if (done) showKey(`Platform key of ${done.slug}`, done.platform_api_key);
    await after(done);
  }

  async function policy(product) {
    await after(await confirmed({
      title: `Policy of ${product.display_name}`, verb: "Replace", text: "In force for the next call.",
      fields: { policy: { label: "Policy", element: area(JSON.stringify(product.policy, null, 2)) } },
      act: (values) => call("PUT", `${path(product)}/policy`, { body: { policy: parsed(values.policy) } }),
    }), "Policy replaced.");
  }

  async function issue(product) {
    const done = await confirmed({
      title: `New platform key for ${product.display_name}`, verb: "Issue",
      fields: {
        scopes: { label: "May", element: h("select", {}, [["manage", "everything (manage)"], ["admit", "admit and read (admit)"],
          ["read", "read only (read)"]].map(([value, text]) => h("option", { value }, text))) },
        days: { label: "Valid for", element: h("select", {}, [["", "ever"], ["7", "7 days"], ["30", "30 days"], ["90", "90 days"],
          ["365", "a year"]].map(([value, text]) => h("option", { value }, text))) },
      },
      act: ({ scopes, days }) => call("POST", `${path(product)}/keys`, { body: {
        scopes: [scopes], ...(days ? { expires_at: new Date(Date.now() + days * 864e5).toISOString() } : {}),
      } }),
    });
    if (done) showKey(`New platform key of ${product.display_name}`, done.platform_api_key);
    await after(done);
  }

  async function rotate(product) {
    const done = await confirmed({
      title: `Rotate the platform keys of ${product.display_name}`, verb: "Rotate",
      text: "A new key that may do everything; the others that may end after the overlap. Keys for admit or read stay.",
      fields: { overlap: { label: "Overlap", element: h("select", {}, [["300", "5 minutes"], ["3600", "1 hour"], ["86400", "1 day"],
        ["0", "none: they end now"]].map(([value, text]) => h("option", { value }, text))) } },
      act: ({ overlap }) => call("POST", `${path(product)}/rotate-platform-key`, { body: { overlap_seconds: Number(overlap) } }),
    });
    if (done) showKey(`New platform key of ${product.display_name}`, done.platform_api_key);
    await after(done);
  }

  async function revoke(product, key) {
    await after(await confirmed({
      title: "Revoke a key", danger: true, verb: "Revoke",
      text: `The key ${key.key_id.slice(0, 8)} of ${product.display_name} (last used: ${key.used}) is refused from the next call on.`,
      act: () => call("DELETE", `${path(product)}/keys/${key.key_id}`),
    }), "Key revoked.");
  }

  async function remove(product) {
    const force = h("select", {}, h("option", { value: "" }, "refuse"), h("option", { value: "true" }, "destroy them"));
    await after(await confirmed({
      title: `Delete ${product.display_name}`, danger: true, verb: "Delete", typed: product.slug,
      text: "The product and its keys are removed. This cannot be undone.",
      fields: { force: { label: "If it has engines", element: force } },
      act: (values) => call("DELETE", `${path(product)}${values.force ? "?force=true" : ""}`),
    }), "Product deleted.");
  }

  return { title: "Products", element, refresh, onEvent: remembered };
}

const area = (text) => {
  const element = h("textarea", { rows: "6", spellcheck: false });
  element.value = text;
  return element;
};

function parsed(text) {
  try {
    return JSON.parse(text || "{}");
  } catch (error) {
    throw new Error(`The policy is not JSON: ${error.message}`);
  }
}
