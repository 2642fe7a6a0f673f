// What several pages show.

import { badge, h } from "../dom.js";

export const STATES = ["running", "sleeping", "provisioning", "stopped", "failed", "destroying"];

export function engineLink(engine) {
  return h("a.engine", { href: `#/engines/${engine.engine_id}`, dataset: { place: "engine" } },
    badge(engine.status), h("span.user", {}, engine.user_id));
}

/** A choice of one product or all; `set(products)` fills it. */
export function productSelect(current, onChange) {
  const element = h("select", { "aria-label": "Product", onchange: () => onChange(element.value) },
    h("option", { value: "" }, "All products"));
  let shown = "";
  return {
    element,
    set(products) {
      const signature = JSON.stringify(products.map((one) => [one.product_id, one.display_name]));
      if (signature !== shown) {
        shown = signature;
        element.replaceChildren(h("option", { value: "" }, "All products"),
          ...products.map((one) => h("option", { value: one.product_id }, one.display_name)));
      }
      element.value = current();
    },
  };
}
