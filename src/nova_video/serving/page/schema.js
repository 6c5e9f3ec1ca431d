// Fields of the form, made from the server's JSON schema of a request: there is no second list of settings.

import { el } from "./dom.js";

/** Names as a person reads them, where the name of the setting does not say enough. */
const TITLES = {
  motion_flow: "Motion", guidance_scale: "Guidance", preset: "Speed", seconds: "Seconds", num_frames: "Frames",
  negative_prompt: "Not wanted", sets: "Sets a frame", fp8: "8 bit floats", fps: "Frames per second",
};

export const titleOf = (name) => TITLES[name] ?? (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");

const parts = (schema) => schema.anyOf ?? [schema];
const kindOf = (schema, type) => parts(schema).find((part) => part.type === type);

/** A setting's label and input. `fallback` is what holds where the field is left empty. */
export function fieldOf(name, schema, fallback) {
  const choices = parts(schema).find((part) => part.enum)?.enum;
  const id = `set-${name}`;
  const hint = el("p", { className: "hint", id: `${id}-hint` }, shortHelp(schema.description));
  const common = { id, name, "aria-describedby": hint.id };
  const empty = fallback === undefined || fallback === null ? "as the model has it" : String(fallback);
  let input;
  if (choices) {
    input = el("select", common, el("option", { value: "" }, empty), ...choices.map((each) => el("option", { value: each }, each)));
  } else if (kindOf(schema, "boolean")) {
    input = el("select", common, el("option", { value: "" }, empty), el("option", { value: "true" }, "yes"), el("option", { value: "false" }, "no"));
  } else {
    const number = kindOf(schema, "integer") ?? kindOf(schema, "number");
    input = el("input", number ? numberOf(common, number, empty) : { ...common, type: "text", placeholder: empty });
  }
  return el("div", { className: "field" }, el("label", { htmlFor: id }, titleOf(name)), input, hint);
}

function numberOf(common, part, empty) {
  return {
    ...common, type: "number", step: part.type === "integer" ? 1 : "any", placeholder: empty, inputMode: part.type === "integer" ? "numeric" : "decimal",
    min: part.minimum ?? part.exclusiveMinimum, max: part.maximum,
  };
}

/** The help without what the empty field says already. */
const shortHelp = (text) => text.replace(/ None: [^.]*\.$/, "");

/** A slider whose left end may mean "as the model has it". */
export function slider(name, { title, low, high, step, value, text }) {
  const id = `set-${name}`;
  const output = el("output", { htmlFor: id });
  const input = el("input", { type: "range", id, name, min: low, max: high, step });
  input.value = value;
  const tell = () => {
    output.textContent = text(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", tell);
  tell();
  const field = el("div", { className: "field" }, el("label", { htmlFor: id }, title, output), input);
  return { field, input, tell };
}

/** A row of choices, one of which is taken. */
export function choice(name, title, values, value) {
  const labels = values.map((each) => el("label", {}, el("input", { type: "radio", name, value: each, checked: each === value }), el("span", {}, each)));
  return el("fieldset", { className: "choice" }, el("legend", {}, title), el("div", {}, ...labels));
}

/** A field's text as a value of JSON. */
export function valueOf(schema, text) {
  if (kindOf(schema, "boolean")) return text === "true";
  if (kindOf(schema, "integer") || kindOf(schema, "number")) return Number(text);
  return text;
}
