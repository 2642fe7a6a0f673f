// Questions before something happens.

import { h } from "./dom.js";

function open(title, content, buttons, onSubmit) {
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); onSubmit?.(); } },
    h("h2", {}, title), content, h("div.buttons", {}, buttons));
  const dialog = h("dialog", { "aria-label": title }, form);
  document.body.append(dialog);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.showModal();
  return dialog;
}

/**
 * Asks before `act` is done: `act(values)` runs while the dialog shows that it works; its error is shown in place.
 * `typed`: what must be typed first. `fields`: inputs by name. Resolves to what `act` returned, null when cancelled.
 */
export function confirmed({ title, text, verb, danger = false, typed = null, fields = {}, act }) {
  return new Promise((resolve) => {
    let result = null;
    const problem = h("p.problem", { role: "alert", hidden: true });
    const proof = typed === null ? null : h("input", {
      name: "proof", autocomplete: "off", spellcheck: false, "aria-label": `Type ${typed}`, oninput: check,
    });
    const go = h(danger ? "button.danger" : "button.primary", { type: "submit", name: "go" }, verb);
    const cancel = h("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
    const dialog = open(title, [
      text ? h("p", {}, text) : null,
      Object.entries(fields).map(([name, { label, element, hint }]) => {
        element.name = name;
        return h("label.field", {}, h("span", {}, label), element, hint ? h("small", {}, hint) : null);
      }),
      proof ? h("label.field", {}, h("span", {}, "Type ", h("code", {}, typed), " to confirm"), proof) : null,
      problem,
    ], [cancel, go], submit);

    function check() {
      go.disabled = proof !== null && proof.value !== typed;
    }
    async function submit() {
      if (go.disabled) return;
      go.disabled = true;
      go.textContent = "Working …";
      try {
        const values = Object.fromEntries(Object.entries(fields).map(([name, { element }]) => [name, element.value]));
        result = (await act(values)) ?? true;
        dialog.close();
      } catch (error) {
        problem.textContent = error.message;
        problem.hidden = false;
        go.textContent = verb;
        check();
      }
    }
    check();
    dialog.addEventListener("close", () => resolve(result));
    (proof ?? Object.values(fields)[0]?.element ?? (danger ? cancel : go)).focus();
  });
}

export function inform(title, content) {
  const dialog = open(title, content, [h("button.primary", { type: "submit" }, "Close")], () => dialog.close());
}
