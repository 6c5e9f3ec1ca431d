// What this browser has made: it keeps the ids, and the server has the rest.

import { getJson } from "./api.js";
import { $, el, plural, show } from "./dom.js";
import { hasEnded } from "./follow.js";
import { sentenceOf, thumbnailOf } from "./result.js";

const KEY = "nova.jobs";
const MOST = 60;

export function ids() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.filter((id) => typeof id === "string") : [];
  } catch {
    return [];
  }
}

const keep = (found) => localStorage.setItem(KEY, JSON.stringify(found.slice(0, MOST)));

export const remember = (id) => keep([id, ...ids().filter((other) => other !== id)]);
export const forget = (id) => keep(ids().filter((other) => other !== id));

export const jobOf = (id) => getJson(`v1/jobs/${encodeURIComponent(id)}`);

/** Asks for the jobs of this browser; those that the server no longer has are forgotten. */
async function load() {
  const found = await Promise.all(ids().map(async (id) => {
    try {
      return await jobOf(id);
    } catch (error) {
      if (error.status === 404) forget(id);
      return null;
    }
  }));
  return found.filter(Boolean);
}

const cards = new Map(); // id -> {node, status}, so that only what is new is drawn

/** Draws the list again. `act` has the functions show, use and remove. Returns the jobs. */
export async function drawHistory(act) {
  const jobs = (await load()).filter((job) => job.status !== "cancelled");
  show($("past-empty"), jobs.length === 0);
  for (const job of jobs) if (cards.get(job.id)?.status !== job.status) cards.set(job.id, { status: job.status, node: cardOf(job, act) });
  $("past").replaceChildren(...jobs.map((job) => cards.get(job.id).node));
  return jobs;
}

function cardOf(job, act) {
  const sentence = sentenceOf(job);
  const picture = el("button", { type: "button", className: "show", "aria-label": `Show: ${sentence}`, onclick: () => act.show(job.id) });
  if (job.status === "completed") {
    thumbnailOf(job).then((blob) => picture.replaceChildren(el("img", { src: URL.createObjectURL(blob), alt: "", loading: "lazy" }))).catch(() => picture.append(el("span", {}, "no picture")));
  } else {
    picture.append(el("span", {}, hasEnded(job) ? `Failed: ${job.error?.message ?? ""}` : "Being made"));
  }
  const length = job.kind === "image" ? "picture" : plural(job.frames, "frame");
  return el("li", { "data-id": job.id }, picture,
    el("p", {}, sentence || "(no sentence)", el("small", {}, `Seed ${job.request.seed} · ${length}`)),
    el("div", { className: "row" },
      el("button", { type: "button", className: "quiet", "aria-label": `Use the settings of: ${sentence}`, onclick: () => act.use(job) }, "Reuse"),
      el("button", { type: "button", className: "quiet", "aria-label": `Delete: ${sentence}`, onclick: () => act.remove(job) }, "Delete"),
    ));
}
