// Further sentences of a clip, each from its second on.

import { button, el } from "./dom.js";

export class Timeline {
  /** `onchange` is called after every change. */
  constructor(node, onchange) {
    this.list = el("ol", { className: "times" });
    this.onchange = onchange;
    node.append(this.list, button("Add a sentence", () => this.add().focus()));
  }

  add(seconds = this.list.children.length + 1, text = "") {
    const time = el("input", { type: "number", min: 0, step: "any", value: seconds, "aria-label": "From second", inputMode: "decimal" });
    const sentence = el("input", { value: text, maxLength: 10000, placeholder: "Sentence from then on", "aria-label": "Sentence from then on" });
    const row = el("li", {}, time, sentence, el("button", { type: "button", className: "quiet", "aria-label": "Remove this sentence", onclick: () => {
      row.remove();
      this.onchange();
    } }, "✕"));
    row.addEventListener("input", () => this.onchange());
    this.list.append(row);
    return sentence;
  }

  /** [seconds, sentence] pairs in the order of time; rows without a sentence are left out. */
  get pairs() {
    const rows = [...this.list.children].map((row) => [Number(row.children[0].value), row.children[1].value.trim()]);
    return rows.filter(([, text]) => text).sort((one, other) => one[0] - other[0]);
  }

  get sentences() {
    return this.pairs.map(([, text]) => text);
  }

  set pairs(pairs) {
    this.list.replaceChildren();
    for (const [seconds, text] of pairs) this.add(seconds, text);
    this.onchange();
  }
}
