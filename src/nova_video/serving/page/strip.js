// The strip of film under the screen: one cell a frame of the model, each filling with its sets.

import { $, el, show } from "./dom.js";

const MOST = 60;

export class Strip {
  constructor() {
    this.node = $("strip");
    this.cells = new Map();
  }

  clear(count = 0) {
    this.node.replaceChildren();
    this.cells.clear();
    show(this.node, count > 1);
    for (let index = 0; index < Math.min(count, MOST); index += 1) this.cell(index);
  }

  cell(index) {
    if (!this.cells.has(index)) {
      const node = el("span");
      this.cells.set(index, node);
      this.node.append(node);
      if (this.cells.size > MOST) {
        const [first, oldest] = this.cells.entries().next().value;
        oldest.remove();
        this.cells.delete(first);
      }
    }
    show(this.node, this.cells.size > 1);
    return this.cells.get(index);
  }

  /** A frame has so much of it, and looks like `preview`. */
  fill(index, share, preview) {
    const node = this.cell(index);
    node.style.setProperty("--done", share);
    node.classList.toggle("whole", share >= 1);
    for (const [other, cell] of this.cells) if (other < index) cell.classList.add("whole");
    if (preview) {
      if (!node.firstChild) node.append(el("img", { alt: "" }));
      node.firstChild.src = preview;
    }
    const edge = node.offsetLeft + node.offsetWidth - this.node.clientWidth;
    if (edge > this.node.scrollLeft) this.node.scrollLeft = edge + 8;
    this.node.setAttribute("aria-label", `Frame ${index + 1} is being made`);
  }

  finish() {
    for (const cell of this.cells.values()) cell.classList.add("whole");
    this.node.setAttribute("aria-label", `All frames are made`);
  }
}
