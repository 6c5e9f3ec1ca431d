// What belongs to a finished result: its settings, the command that makes the same, and what can be done with it.

import { call, getBlob } from "./api.js";
import { $, button, download, el, show, showError } from "./dom.js";
import { titleOf } from "./schema.js";

const HIDDEN = ["prompt", "num_images_per_prompt", "negative_prompt"];

export const modeOf = (job) => {
  if (job.kind === "session") return "live";
  if ("mask_image" in job.inputs || "strength" in job.request) return "edit";
  if (job.kind === "image") return "picture";
  return "video" in job.inputs ? "continue" : "clip";
};

const contentPath = (job, index = 0) =>
  job.kind === "image" ? `v1/images/${job.id}/content?index=${index}` : `v1/videos/${job.id}/content`;

export const contentOf = (job, index) => getBlob(contentPath(job, index));

export const thumbnailOf = (job) => getBlob(job.kind === "image" ? contentPath(job) : `v1/videos/${job.id}/content?variant=thumbnail`);

export const fileName = (job, index = 0) => {
  const words = sentenceOf(job).toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || "nova";
  const suffix = job.kind === "image" ? job.form?.output_format ?? "png" : "mp4";
  return `${words}-${job.request.seed + index}.${suffix}`;
};

export const sentenceOf = (job) => {
  const prompt = job.request.prompt ?? "";
  return Array.isArray(prompt) ? prompt.map(([seconds, text]) => (seconds ? `${seconds} s: ${text}` : text)).join(" · ") : prompt;
};

/** Shows the settings and actions of a result. `act` has the functions use, goOn, edit and remove. */
export function showResult(job, act, index = 0) {
  const box = $("result");
  const facts = Object.entries(job.request).filter(([name, value]) => value !== null && !HIDDEN.includes(name));
  const { settings } = job;
  const own = [["size", `${settings.width}×${settings.height}`], ["sets", settings.sets], ["guidance_scale", settings.guidance_scale]];
  if (job.kind !== "image") own.push(["frames", `${job.frames} at ${settings.fps} a second`], ["motion_flow", settings.motion_flow]);
  const known = new Map([...own, ...facts.filter(([name]) => !["width", "height", "num_frames", "seconds", "fps"].includes(name))]);
  if (index) known.set("seed", job.request.seed + index);
  const guard = (what) => () => Promise.resolve(what()).catch(showError);
  const isKept = job.status === "completed";
  box.replaceChildren(
    ...(job.warnings ?? []).map((line) => el("div", { className: "problems" }, el("p", {}, line[0].toUpperCase() + line.slice(1)))),
    el("div", { className: "actions" },
      ...(isKept ? [button("Download", guard(async () => download(await contentOf(job, index), fileName(job, index))))] : []),
      button("Use these settings", guard(() => act.use(job))),
      ...(isKept && job.kind !== "image" ? [button("Go on from it", guard(() => act.goOn(job)))] : []),
      ...(isKept ? [button("Edit it", guard(() => act.edit(job, index)))] : []),
      button("Delete", guard(() => act.remove(job)), "quiet"),
    ),
    el("dl", { className: "facts" }, ...[...known].map(([name, value]) => el("div", {}, el("dt", {}, titleOf(name)), el("dd", {}, asText(value))))),
    commandOf(job),
  );
  show(box, true);
}

function commandOf(job) {
  if (!job.command) return el("p", { className: "hint" }, "No single command makes the same.");
  const copy = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(job.command);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      copy.textContent = "Selected";
    }
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  });
  copy.setAttribute("aria-label", "Copy the command");
  const words = job.command.split(" ").map((word) => el("span", {}, word)); // a line breaks between words alone
  const code = el("code", {}, ...words.flatMap((word, index) => (index ? [" ", word] : [word])));
  const files = Object.keys(job.inputs).map((name) => button(job.inputs[name], async () => {
    const { blob, name: file } = await inputOf(job, name);
    download(blob, file);
  }, "link"));
  const needs = files.length ? [" It needs ", ...files.flatMap((each, index) => (index ? [" and ", each] : [each])), " in the same folder."] : [];
  return el("div", {}, el("p", { className: "hint" }, "The same from the shell.", ...needs), el("div", { className: "command" }, code, copy));
}

function asText(value) {
  if (!Array.isArray(value)) return String(value);
  return value.map((pair) => (Array.isArray(pair) ? `${pair[1]} from ${pair[0]} s` : pair)).join(", ");
}

/** The media that a job was given, as files to give again. */
export async function inputOf(job, name) {
  const answer = await call(`v1/jobs/${job.id}/inputs/${name}`);
  return { blob: await answer.blob(), name: job.inputs[name] };
}
