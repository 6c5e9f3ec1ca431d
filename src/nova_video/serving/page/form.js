// The form: what to make, from what, and the settings. It reads itself as a request and is filled from one.

import { Brush } from "./brush.js";
import { $, button, el, plural, show, showError } from "./dom.js";
import { choice, fieldOf, slider, titleOf, valueOf } from "./schema.js";
import { Timeline } from "./timeline.js";

const MODES = {
  clip: { text: "", make: "Make the clip", given: "A picture to begin with (optional)", accept: "image/*" },
  picture: { text: "", make: "Make the picture" },
  live: { text: "A clip without end. Change its sentence and motion while it plays; stop when you have enough.", make: "Start" },
  continue: { text: "Adds to the end of a clip.", make: "Go on", given: "The clip to go on from", accept: "video/*,image/gif,image/webp" },
  edit: { text: "Makes a part of a picture or clip anew; the rest stays.", make: "Make the edit", given: "The picture or clip to edit", accept: "image/*,video/*" },
};
const EVERYDAY = ["seconds", "num_frames", "motion_flow", "preset", "seed"];
const MOST_VARIATIONS = 8;
const STILL = ["fps", "motion_flow", "context_frames", "sink_frames", "history_noise", "reanchor_frames", "hold_statistics", "image_guidance_scale"];
/** Settings that only mean something of clips. */

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

export class Form {
  constructor(about, onchange) {
    this.about = about;
    this.onchange = onchange;
    this.given = null; // {blob, name, isClip, id}: id is that of a result of this server
    this.brush = new Brush($("brush"));
    this.timeline = new Timeline($("timeline"), onchange);
    if (!about.video) for (const mode of ["clip", "live", "continue"]) show($("form").querySelector(`[value=${mode}]`).parentElement, false);
    this.buildEveryday();
    this.buildSettings();
    this.listen();
    this.mode = about.video ? "clip" : "picture";
  }

  // Building ----------------------------------------------------------------------------------------------------------

  buildEveryday() {
    const { defaults, temporal_stride: stride, limits } = this.about;
    const most = Math.min(limits.max_frames, Math.max(8 * defaults.num_frames, 121));
    this.length = slider("frames", {
      title: "Length", low: stride + 1, high: 1 + stride * Math.floor((most - 1) / stride), step: stride, value: Math.max(defaults.num_frames, stride + 1),
      text: (value) => `${(value / this.fps).toFixed(1)} s · ${plural(value, "frame")}`,
    });
    this.motion = slider("motion", { title: "Motion", low: 0, high: Math.max(20, 2 * defaults.motion_flow), step: 0.5, value: defaults.motion_flow, text: String });
    const presets = choice("preset", "Speed", Object.keys(this.about.presets), "exact");
    const seed = el("input", { id: "set-seed", type: "number", min: 0, step: 1, placeholder: "random", inputMode: "numeric" });
    const dice = button("New", () => (seed.value = randomSeed()));
    dice.setAttribute("aria-label", "A new random seed");
    this.seed = seed;
    this.count = el("input", { id: "set-count", type: "number", min: 1, max: MOST_VARIATIONS, step: 1, value: 1, inputMode: "numeric" });
    this.length.field.classList.add("wide");
    this.motion.field.classList.add("wide");
    presets.classList.add("wide");
    $("everyday").append(
      this.length.field, this.motion.field, presets,
      el("div", { className: "field" }, el("label", { htmlFor: seed.id }, "Seed"), el("div", { className: "row" }, seed, dice)),
      this.countField = el("div", { className: "field" }, el("label", { htmlFor: this.count.id }, "Variations"), this.count),
    );
  }

  buildSettings() {
    const { groups, request, defaults } = this.about;
    const negative = fieldOf("negative_prompt", { type: "string", description: "What the result should not show." }, "nothing");
    const sections = groups.map(({ title, names }) => {
      const fields = names.filter((name) => !EVERYDAY.includes(name)).map((name) => {
        const schema = request.properties[name];
        const field = fieldOf(name, schema, defaults[name] ?? schema.default);
        field.dataset.name = name;
        return field;
      });
      return fields.length ? el("section", {}, el("h3", {}, title), ...fields) : null;
    });
    $("settings").append(negative, ...sections.filter(Boolean));
    $("settings").addEventListener("input", (event) => {
      if (event.target.name === "fps") this.length.tell();
      this.onchange();
    });
  }

  listen() {
    for (const radio of this.radios) radio.addEventListener("change", () => this.change());
    $("file").addEventListener("change", () => this.take($("file").files[0]));
    $("file-remove").addEventListener("click", () => this.drop());
    const drop = $("drop");
    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      this.take(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", (event) => {
      const file = event.clipboardData.files[0];
      if (file && MODES[this.mode].given) this.take(file);
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        $("form").requestSubmit();
      }
    });
  }

  // Modes and media ---------------------------------------------------------------------------------------------------

  get radios() {
    return [...$("form").elements.mode];
  }

  get mode() {
    return this.radios.find((radio) => radio.checked).value;
  }

  set mode(mode) {
    for (const radio of this.radios) radio.checked = radio.value === mode;
    this.change();
  }

  /** The request is for a picture. */
  get isPicture() {
    return this.mode === "picture" || (this.mode === "edit" && this.given !== null && !this.given.isClip);
  }

  change() {
    const mode = this.mode, facts = MODES[mode];
    if (this.given && (!facts.given || (mode === "continue" && !this.given.isClip) || (mode === "clip" && this.given.isClip))) this.drop();
    $("mode-text").textContent = facts.text;
    show($("mode-text"), Boolean(facts.text));
    show($("given"), Boolean(facts.given));
    $("file").accept = facts.accept ?? "";
    if (!this.given) $("file-text").textContent = facts.given ?? "";
    show($("timeline-part"), mode === "clip");
    show(this.length.field, mode === "clip" || mode === "continue");
    this.length.field.querySelector("label").firstChild.textContent = mode === "continue" ? "How much more" : "Length";
    show(this.motion.field, this.about.video && !this.isPicture);
    show(this.countField, mode !== "live");
    for (const field of $("settings").querySelectorAll("[data-name]")) show(field, this.uses(field.dataset.name));
    this.openBrush();
    $("make").textContent = facts.make;
    this.onchange();
  }

  uses(name) {
    if (name === "strength") return this.mode === "edit";
    if ((name === "width" || name === "height") && (this.mode === "edit" || this.mode === "continue")) return false;
    return !this.isPicture || !STILL.includes(name);
  }

  /** Takes a file, or a result of this server, as what is given. */
  take(blob, name = blob?.name ?? "", id = null) {
    showError(null);
    if (!blob) return;
    if (blob.size > this.about.limits.body_mb * 1e6) {
      showError(new Error(`${name} has ${(blob.size / 1e6).toFixed(1)} MB: this server takes at most ${this.about.limits.body_mb} MB`));
      return;
    }
    const isClip = blob.type.startsWith("video/") || blob.type === "image/gif";
    if (!isClip && !blob.type.startsWith("image/")) {
      showError(new Error(`${name} is neither a picture nor a clip: expected one`));
      return;
    }
    this.given = { blob, name, isClip, id };
    $("file-text").textContent = name;
    $("drop").classList.add("full");
    show($("file-remove"), true);
    this.brush.close();
    this.change();
  }

  drop() {
    this.given = null;
    $("file").value = "";
    $("drop").classList.remove("full");
    show($("file-remove"), false);
    this.brush.close();
    $("file-text").textContent = MODES[this.mode].given ?? "";
    this.openBrush();
    this.change();
  }

  openBrush() {
    const wanted = this.mode === "edit" && this.given !== null;
    show($("brush"), wanted);
    if (!wanted || this.brush.canvas || this.brush.opening) return;
    this.brush.opening = true;
    const isVideo = this.given.blob.type.startsWith("video/");
    this.brush.open(URL.createObjectURL(this.given.blob), isVideo).catch(showError).finally(() => (this.brush.opening = false));
  }

  // Reading and filling -----------------------------------------------------------------------------------------------

  get fps() {
    return Number($("settings")?.querySelector("[name=fps]")?.value) || this.about.defaults.fps;
  }

  get prompt() {
    return $("prompt").value.trim();
  }

  get variations() {
    return this.mode === "live" ? 1 : Math.min(MOST_VARIATIONS, Math.max(1, Math.round(Number(this.count.value) || 1)));
  }

  /** The settings that differ from the model's own, by name. */
  get options() {
    const found = {};
    const { defaults, request } = this.about;
    for (const input of $("settings").querySelectorAll("[name]")) {
      const field = input.closest("[data-name]");
      if (!input.value.trim() || (field && !this.uses(field.dataset.name))) continue;
      if (!input.checkValidity()) throw new Error(`${titleOf(input.name)} is ${input.value}: ${input.validationMessage}`);
      found[input.name] = valueOf(request.properties[input.name], input.value.trim());
    }
    const preset = $("everyday").querySelector("[name=preset]:checked").value;
    if (preset !== "exact") found.preset = preset;
    const motion = Number(this.motion.input.value);
    if (!this.motion.field.hidden && motion !== defaults.motion_flow) found.motion_flow = motion;
    return found;
  }

  /** The first seed; a random one is drawn here, so that variations have the next ones. */
  get firstSeed() {
    if (this.seed.value === "") return randomSeed();
    if (!/^\d{1,18}$/.test(this.seed.value)) throw new Error(`Seed is ${this.seed.value}: expected a whole number from 0 on`);
    return Number(this.seed.value);
  }

  get frames() {
    return Number(this.length.input.value);
  }

  /** Fills itself with the settings behind a result. */
  fill(mode, request, given) {
    const pairs = Array.isArray(request.prompt) ? request.prompt : [[0, request.prompt ?? ""]];
    this.given = null;
    this.mode = mode;
    $("prompt").value = pairs[0][1];
    this.timeline.pairs = pairs.slice(1);
    if (pairs.length > 1) $("timeline-part").open = true;
    for (const input of $("settings").querySelectorAll("[name]")) input.value = plain(request[input.name]);
    const frames = request.num_frames ?? (request.seconds && Math.round(request.seconds * this.fps)) ?? this.about.defaults.num_frames;
    if (Number.isFinite(frames)) setSlider(this.length, frames);
    setSlider(this.motion, plain(request.motion_flow) || this.about.defaults.motion_flow);
    this.seed.value = request.seed ?? "";
    this.count.value = request.num_images_per_prompt ?? 1;
    $("everyday").querySelector(`[name=preset][value=${request.preset ?? "exact"}]`).checked = true;
    if (given) this.take(given.blob, given.name, given.id);
    $("prompt").dispatchEvent(new Event("input", { bubbles: true }));
    this.change();
    $("prompt").focus();
  }
}

/** A value of a request as the text of a field; of one that changes in time, the first. */
function plain(value) {
  if (Array.isArray(value)) return String(value[0]?.[1] ?? value[0] ?? "");
  return value === undefined || value === null ? "" : String(value);
}

function setSlider({ input, tell }, value) {
  input.value = value;
  tell();
}
