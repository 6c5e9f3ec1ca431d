// What the model knows: hints while somebody types, sentences to begin with, and the list of its words.

import { getJson } from "./api.js";
import { $, button, debounce, el, plural, show } from "./dom.js";

/** Shows under a field which of its words the model does not know. Returns a function that checks at once. */
export function watchWords(field, box, { isPicture = () => false, others = () => [], negative = () => "" } = {}) {
  let last = 0;
  const check = async () => {
    const number = (last += 1);
    const prompts = [field.value, ...others()].filter((text) => text.trim());
    const json = { prompts, negative_prompt: negative(), picture: isPicture() };
    const problems = prompts.length || json.negative_prompt
      ? (await getJson("v1/about/problems", { method: "POST", json })).problems
      : [];
    if (number === last) showProblems(box, problems, field);
  };
  const later = debounce(() => check().catch(() => {}), 250);
  field.addEventListener("input", later);
  return later;
}

function showProblems(box, problems, field) {
  box.replaceChildren(...problems.map((line) => el("p", {}, ...withSuggestions(line, field))));
}

/** A line, its suggestions as buttons that put them into the sentence. */
function withSuggestions(line, field) {
  const [, unknown, rest] = /^not known: "(.*?)"; did you mean (.*)\?$/.exec(line) ?? [];
  if (!unknown) return [`${line[0].toUpperCase()}${line.slice(1)}`];
  const names = [...rest.matchAll(/"([^"]*)"/g)].map((match) => match[1]);
  const buttons = names.map((name) => button(name, () => replaceWords(field, unknown, name)));
  return [`Not known: “${unknown}”. Did you mean `, ...buttons.flatMap((each, index) => (index ? [" or ", each] : [each])), "?"];
}

function replaceWords(field, unknown, name) {
  const pattern = new RegExp(unknown.split(" ").map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("\\s+"), "i");
  field.value = pattern.test(field.value) ? field.value.replace(pattern, name) : `${field.value} ${name}`;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  field.focus();
}

function insertWord(field, phrase) {
  const at = field.selectionStart ?? field.value.length;
  const before = field.value.slice(0, at), after = field.value.slice(field.selectionEnd ?? at);
  const space = before && !before.endsWith(" ") ? " " : "";
  field.setRangeText(space + phrase + (after && !after.startsWith(" ") ? " " : ""), at, field.selectionEnd ?? at, "end");
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

/** Sentences to begin with, shown while the field is empty. */
export function offerExamples(words, field) {
  const box = $("examples");
  const examples = words?.examples ?? [];
  if (examples.length) field.placeholder = `Such as: ${examples.at(-1)}`;
  const pick = examples.slice(0, 3).map((text) => button(text, () => {
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.focus();
  }));
  box.replaceChildren(...pick);
  const tell = () => show(box, pick.length > 0 && !field.value);
  field.addEventListener("input", tell);
  tell();
}

/** The list of all words, each to be put into the sentence. */
export function listWords(words, field) {
  show($("known-part"), true);
  if (!words) {
    show($("known-search").parentElement, false);
    $("known-text").textContent = "It reads any text: it was trained on captions in plain language.";
    return;
  }
  const count = words.lists.reduce((sum, each) => sum + each.phrases.length, 0);
  $("known-summary").textContent = `What this model knows: ${plural(count, "phrase")}`;
  $("known-text").textContent = `A small model draws what it was trained on. Sentences are such as ${words.clips.slice(0, 1).map((each) => `“${each}”`)}; what is in brackets may be absent.`;
  const lists = words.lists.map((each) => {
    const buttons = each.phrases.map((phrase) => button(phrase, () => insertWord(field, phrase)));
    const title = el("h3", {}, `${each.title} (${each.phrases.length})`);
    return { buttons, nodes: [title, el("div", { className: "phrases" }, ...buttons)] };
  });
  $("known-lists").replaceChildren(...lists.flatMap((each) => each.nodes));
  $("known-search").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    for (const { buttons, nodes } of lists) {
      for (const each of buttons) show(each, each.textContent.toLowerCase().includes(wanted));
      for (const node of nodes) show(node, buttons.some((each) => !each.hidden));
    }
  });
}
