// Elements, made of data only: text never becomes markup.

/** h("a.quiet", {href, onclick, dataset, …}, child, …): an element; null and false children are left out. */
export function h(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "dataset") Object.assign(element.dataset, value);
    else if (key === "style") Object.assign(element.style, value);
    else if (key in element && typeof value !== "string") element[key] = value;
    else element.setAttribute(key === "className" ? "class" : key, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/**
 * Makes the children of `container` those of `items`, in order. An element whose item has not changed stays the same
 * element, so that focus, selection and open menus survive a live update; a changed one gives its focus on.
 */
export function keyed(container, items, keyOf, render) {
  const former = new Map([...container.children].map((child) => [child.dataset.key, child]));
  const focused = container.contains(document.activeElement) ? document.activeElement : null;
  const focusedKey = focused?.closest("[data-key]")?.dataset.key;
  const focusedPlace = focused?.dataset.place;
  items.forEach((item, position) => {
    const key = String(keyOf(item));
    const signature = JSON.stringify(item);
    let element = former.get(key);
    former.delete(key);
    if (!element || element.signature !== signature) {
      const fresh = render(item);
      fresh.dataset.key = key;
      fresh.signature = signature;
      if (element) element.replaceWith(fresh);
      element = fresh;
    }
    const there = container.children[position];
    if (there !== element) container.insertBefore(element, there ?? null);
  });
  for (const gone of former.values()) gone.remove();
  if (focused && !focused.isConnected && focusedKey !== undefined) {
    const row = [...container.children].find((child) => child.dataset.key === focusedKey);
    const place = focusedPlace ? row?.querySelector(`[data-place="${focusedPlace}"]`) : row;
    (place ?? row)?.focus();
  }
}

export function badge(status) {
  return h("span.badge", { dataset: { status } }, status);
}

/** A button that copies `text`, and says so. */
export function copyButton(text, what = "Copy") {
  const button = h("button.quiet.small", { type: "button", onclick: copy, title: `Copy ${text.length < 80 ? text : ""}` }, what);
  async function copy(event) {
    event.stopPropagation();
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without a secure context there is no clipboard interface, only this.
      const area = h("textarea", { value: text, readOnly: true, style: { position: "fixed", opacity: "0" } });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = what; }, 1500);
  }
  return button;
}

/** A passing remark in the corner; errors stay longer. */
export function note(text, kind = "info") {
  const element = h("div.note", { dataset: { kind } }, h("span", {}, text),
    h("button.quiet.small", { type: "button", "aria-label": "Dismiss", onclick: () => element.remove() }, "✕"));
  document.getElementById("notes").append(element);
  setTimeout(() => element.remove(), kind === "error" ? 12000 : 4000);
}
