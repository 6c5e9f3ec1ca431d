// Paints the mask of an edit over a picture or clip: with a pen, a finger, the mouse, or as rectangles by number.

import { button, el } from "./dom.js";

const COLOUR = "#fff"; // the style sheet shows it as the picture's opposite
const UNDO = 20;

export class Brush {
  /** `node` is where it is put. */
  constructor(node) {
    this.node = node;
    this.canvas = null;
  }

  /** Shows a picture or clip, by the URL of its bytes, and an empty mask on it. Resolves once its size is known. */
  async open(url, isClip) {
    const view = await load(url, isClip);
    const { width, height, node } = view;
    this.canvas = el("canvas", { width, height, tabIndex: 0, "aria-label": "Mask: what you paint is made anew. Rectangles can be added by numbers below." });
    this.pen = this.canvas.getContext("2d", { willReadFrequently: true });
    this.history = [];
    this.node.replaceChildren(
      el("p", { className: "hint" }, "Paint over what is to be made anew."),
      el("div", { className: "brush-view" }, node, this.canvas),
      ...(isClip && node.duration ? [seekBar(node)] : []),
      this.tools(width),
      this.rectangles(width, height),
    );
    this.listen();
  }

  close() {
    this.canvas = null;
    this.node.replaceChildren();
  }

  tools(width) {
    this.erases = false;
    this.size = el("input", { type: "range", min: 2, max: Math.round(width / 2), value: Math.round(width / 6), id: "brush-size" });
    const erase = button("Eraser", () => {
      this.erases = !this.erases;
      erase.setAttribute("aria-pressed", this.erases);
    });
    erase.setAttribute("aria-pressed", "false");
    return el(
      "div", { className: "brush-tools" },
      erase,
      button("Undo", () => this.undo()),
      button("All", () => this.paintAll()),
      button("Clear", () => this.clear()),
      el("label", { htmlFor: "brush-size", className: "hint" }, "Size"), this.size,
    );
  }

  rectangles(width, height) {
    const names = { x: ["Left", width, 0], y: ["Top", height, 0], w: ["Width", width, Math.round(width / 2)], h: ["Height", height, Math.round(height / 2)] };
    const fields = {};
    const labels = Object.entries(names).map(([name, [title, high, value]]) => {
      fields[name] = el("input", { type: "number", min: 0, max: high, value, inputMode: "numeric" });
      return el("label", {}, title, fields[name]);
    });
    const add = button("Add this rectangle", () => {
      this.remember();
      const [x, y, w, h] = Object.values(fields).map((field) => Number(field.value));
      this.pen.globalCompositeOperation = this.erases ? "destination-out" : "source-over";
      this.pen.fillStyle = COLOUR;
      this.pen.fillRect(x, y, w, h);
    });
    return el("details", { className: "fold" }, el("summary", {}, "A rectangle by numbers, in pixels"), el("div", { className: "box" }, ...labels, add));
  }

  listen() {
    const canvas = this.canvas;
    let last = null;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button > 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.remember();
      last = at(event);
      this.stroke(last, last, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      for (const each of event.getCoalescedEvents?.() ?? [event]) {
        const next = at(each);
        this.stroke(last, next, each);
        last = next;
      }
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (last = null));
  }

  stroke(from, to, event) {
    const pen = this.pen;
    const pressure = event.pointerType === "pen" && event.pressure ? 0.4 + 1.2 * event.pressure : 1;
    const erases = this.erases || event.buttons === 32; // the other end of a pen
    pen.globalCompositeOperation = erases ? "destination-out" : "source-over";
    pen.strokeStyle = COLOUR;
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = Number(this.size.value) * pressure;
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
  }

  remember() {
    this.history.push(this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height));
    if (this.history.length > UNDO) this.history.shift();
  }

  undo() {
    const last = this.history.pop();
    if (last) this.pen.putImageData(last, 0, 0);
  }

  clear() {
    this.remember();
    this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  paintAll() {
    this.remember();
    this.pen.globalCompositeOperation = "source-over";
    this.pen.fillStyle = COLOUR;
    this.pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /** The mask as a PNG, white where something new is to come and black elsewhere; null if nothing is painted. */
  async mask() {
    if (!this.canvas) return null;
    const { width, height } = this.canvas;
    const image = this.pen.getImageData(0, 0, width, height);
    let any = false;
    for (let at = 0; at < image.data.length; at += 4) {
      const painted = image.data[at + 3] > 127;
      any ||= painted;
      image.data.fill(painted ? 255 : 0, at, at + 3);
      image.data[at + 3] = 255;
    }
    if (!any) return null;
    const canvas = el("canvas", { width, height });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }
}

async function load(url, isClip) {
  const node = isClip ? el("video", { src: url, muted: true, playsInline: true, preload: "auto" }) : el("img", { src: url, alt: "What is edited" });
  const known = new Promise((resolve, reject) => {
    node.addEventListener(isClip ? "loadeddata" : "load", resolve, { once: true });
    node.addEventListener("error", reject, { once: true });
  });
  try {
    await known;
    return { node, width: node.naturalWidth ?? node.videoWidth, height: node.naturalHeight ?? node.videoHeight };
  } catch {
    throw new Error(`This browser cannot show that ${isClip ? "clip" : "picture"}: expected one that it can, such as ${isClip ? "mp4 or webm" : "png or jpeg"}`);
  }
}

function seekBar(video) {
  const input = el("input", { type: "range", min: 0, max: video.duration, step: video.duration / 100, value: 0, "aria-label": "Moment of the clip that is shown" });
  input.addEventListener("input", () => (video.currentTime = Number(input.value)));
  return input;
}
