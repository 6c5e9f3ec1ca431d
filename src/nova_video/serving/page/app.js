// Wires the page: what is asked for goes to the server, and what comes back to the stage and the list below.

import { askForKey, call, events, getJson } from "./api.js";
import { $, el, isCalm, plural, show, showError } from "./dom.js";
import { follow, hasEnded } from "./follow.js";
import { Form, randomSeed } from "./form.js";
import { drawHistory, forget, ids, jobOf, remember } from "./history.js";
import { LiveSession } from "./live.js";
import { canStream } from "./player.js";
import { contentOf, fileName, inputOf, modeOf, showResult } from "./result.js";
import { Stage } from "./stage.js";
import { listWords, offerExamples, watchWords } from "./words.js";

let about, stage, form, checkWords, checkLive;
let shown = null; // what the stage shows: {id, abort, session, entries}

async function main() {
  $("key-open").addEventListener("click", () => askForKey().then(() => location.reload()));
  about = await getJson("v1/about");
  $("model").textContent = `${about.model} · ${about.sizes.width}×${about.sizes.height}`;
  $("model").title = `nova-video ${about.version}`;
  stage = new Stage(about);
  form = new Form(about, () => checkWords?.());
  checkWords = watchWords($("prompt"), $("problems"), {
    isPicture: () => form.isPicture,
    others: () => (form.mode === "clip" ? form.timeline.sentences : []),
    negative: () => $("set-negative_prompt").value,
  });
  checkLive = watchWords($("live-prompt"), $("live-problems"));
  offerExamples(about.words, $("prompt"));
  listWords(about.words, $("prompt"));
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    start().catch(fail);
  });
  for (const [id, act] of [["pause", pauseOrResume], ["stop", stop], ["cancel", throwAway]]) $(id).addEventListener("click", () => act().catch(fail));
  $("live").addEventListener("submit", (event) => {
    event.preventDefault();
    changeSentence();
  });
  $("live-motion").addEventListener("input", () => ($("live-motion-value").textContent = $("live-motion").value));
  $("live-motion").addEventListener("change", changeMotion);
  const jobs = await drawHistory(actions);
  const running = jobs.filter((job) => !hasEnded(job));
  if (running.length) await takeUp(running);
}

function fail(error) {
  if (error?.name === "AbortError") return;
  showError(error);
  stage?.status("");
}

// Asking ---------------------------------------------------------------------------------------------------------------

async function start() {
  showError(null);
  const mode = form.mode;
  if (!form.prompt) {
    $("prompt").focus();
    throw new Error("The sentence is empty: expected what is to be seen");
  }
  if ((mode === "continue" || mode === "edit") && !form.given) throw new Error(mode === "edit" ? "There is nothing to edit: choose a picture or clip first" : "There is nothing to go on from: choose a clip first");
  const words = { prompt: form.prompt, ...form.options };
  leave();
  $("make").disabled = true;
  try {
    if (mode === "live") startLive(words);
    else if (mode === "picture" || (mode === "edit" && !form.given.isClip)) await startPictures(words);
    else await startClips(words);
    if (matchMedia("(max-width: 59.99rem)").matches) $("screen").scrollIntoView({ block: "start" });
  } finally {
    $("make").disabled = false;
  }
}

/** A request as a form: what the client library of the dialect sends. */
function asForm(words) {
  const data = new FormData();
  for (const [name, value] of Object.entries(words)) {
    if (value instanceof Blob) data.append(name, value, value.name ?? (value.type.startsWith("video/") ? "clip.mp4" : "picture.png"));
    else data.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  return data;
}

const givenWord = () => (form.given.id && form.given.isClip ? { id: form.given.id } : form.given.blob);

async function startClips(words) {
  const mode = form.mode, seed = form.firstSeed, paths = { clip: "v1/videos", continue: "v1/videos/extensions", edit: "v1/videos/edits" };
  if (mode === "clip") {
    words.num_frames = form.frames;
    if (form.timeline.pairs.length) words.timeline = form.timeline.pairs;
    if (form.given) words.input_reference = form.given.blob;
  } else {
    words.video = givenWord();
    if (mode === "continue") words.seconds = (form.frames - 1) / form.fps;
  }
  if (mode === "edit") await addMask(words);
  const entries = [];
  for (let index = 0; index < form.variations; index += 1) {
    const video = await getJson(paths[mode], { method: "POST", form: asForm({ ...words, seed: seed + index }) });
    remember(video.id);
    entries.push({ id: video.id, seed: seed + index, done: false });
  }
  drawHistory(actions).catch(fail);
  watch(entries);
}

async function addMask(words) {
  const mask = await form.brush.mask();
  if (mask) words.mask = mask;
  else if (words.strength === undefined) throw new Error("Nothing is painted: paint what is to be made anew, or set Strength under All settings");
}

// Clips ----------------------------------------------------------------------------------------------------------------

/** Follows jobs one after another, the first one first, until somebody chooses another. */
function watch(entries) {
  shown = { entries, chosen: null };
  drawVariations(entries);
  const run = shown;
  (async () => {
    for (const entry of entries) {
      if (shown !== run || run.chosen) return;
      await watchOne(entry);
    }
  })().catch(fail);
}

async function watchOne(entry) {
  const run = shown;
  run.abort?.abort();
  run.abort = new AbortController();
  run.id = entry.id;
  const { signal } = run.abort;
  markVariation(entry);
  const known = await jobOf(entry.id);
  if (signal.aborted) return;
  if (hasEnded(known)) return showEnded(known, entry);
  const { settings } = known;
  stage.shape(settings.width, settings.height);
  stage.begin({ frames: latentFrames(settings.num_frames), endless: settings.num_frames === null, isClip: known.kind !== "image" });
  showControls(known);
  await follow(entry.id, stage, { signal, onstatus: showControls, withVideo: canStream && known.kind !== "image" });
  if (signal.aborted) return;
  entry.done = true;
  stage.end();
  show($("controls"), false);
  const full = await jobOf(entry.id).catch(() => null);
  if (full && !canStream && full.status === "completed") await showEnded(full, entry);
  else if (full) afterEnd(full, entry);
  await drawHistory(actions);
}

function afterEnd(job, entry) {
  if (job.status === "completed") {
    stage.status(endText(job));
    showResult(job, actions);
    if (entry) thumbVariation(entry, job);
  } else if (job.status === "failed") {
    stage.clear();
    stage.status("");
    showError(new Error(`It failed: ${job.error?.message ?? "the server's log tells more"}`));
    showResult(job, actions);
  }
}

const endText = (job) => (job.kind === "image" ? "Done." : `${job.stopped ? "Stopped" : "Done"}: ${plural(job.frames, "frame")}, ${(job.frames / job.settings.fps).toFixed(1)} s.`);

const latentFrames = (frames) => (frames ? 1 + Math.ceil((frames - 1) / about.temporal_stride) : 0);

/** Shows a result that is there already. */
async function showEnded(job, entry = null, index = 0) {
  stage.shape(job.settings.width, job.settings.height);
  stage.begin({ isClip: false });
  show($("controls"), false);
  if (job.status === "completed") {
    const blob = await contentOf(job, index);
    if (job.kind === "image") stage.picture(URL.createObjectURL(blob));
    else stage.play(blob);
  }
  stage.end();
  if (entry) entry.done = true;
  afterEnd(job, entry);
}

function showControls(job) {
  if (shown?.id !== job.id) return;
  shown.paused = job.paused;
  show($("controls"), !hasEnded(job));
  show($("pause"), job.kind !== "image");
  show($("stop"), job.kind !== "image");
  $("stop").disabled = job.frames === 0;
  $("pause").textContent = job.paused ? "Go on" : "Pause";
  if (job.kind === "session") stage.badge(job.paused ? "paused" : "live", !job.paused);
}

async function pauseOrResume() {
  const wanted = shown.paused ? "resume" : "pause";
  await call(`v1/videos/${shown.id}/${wanted}`, { method: "POST" });
  if (wanted === "pause") $("video").pause();
  else if (!isCalm()) stage.player.start();
}

async function stop() {
  await call(`v1/videos/${shown.id}/stop`, { method: "POST" });
}

async function throwAway() {
  const { id, entries } = shown;
  const left = entries?.some((each) => each.id === id) ? entries.filter((each) => !each.done) : [{ id }];
  leave();
  stage.clear();
  for (const entry of left) {
    forget(entry.id);
    await call(`v1/jobs/${entry.id}`, { method: "DELETE" });
  }
  stage.status("Thrown away.");
  await drawHistory(actions);
}

// Variations -----------------------------------------------------------------------------------------------------------

function drawVariations(entries, choose = (entry) => {
  shown.chosen = entry;
  watchOne(entry).catch(fail);
}) {
  const box = $("variations");
  show(box, entries.length > 1);
  box.replaceChildren(...entries.map((entry) => {
    entry.node = el("button", { type: "button", "aria-pressed": "false", onclick: () => choose(entry) }, el("span", { className: "blank" }), `Seed ${entry.seed}`);
    return entry.node;
  }));
}

function markVariation(entry) {
  for (const other of shown.entries ?? []) other.node?.setAttribute("aria-pressed", String(other === entry));
}

async function thumbVariation(entry, job) {
  if (!entry.node || $("variations").hidden) return;
  const blob = await contentPreview(job);
  entry.node.firstChild.replaceWith(el("img", { src: URL.createObjectURL(blob), alt: "" }));
}

const contentPreview = async (job) => (await call(`v1/videos/${job.id}/content?variant=thumbnail`)).blob();

// Pictures -------------------------------------------------------------------------------------------------------------

/** Pictures come as one stream: the canvas after some of the sets, and at the end the pictures. */
async function startPictures(words) {
  const edits = form.mode === "edit", count = form.variations, seed = form.firstSeed;
  const request = { ...words, seed, n: count, stream: true, partial_images: 3 };
  if (edits) {
    request.image = form.given.blob;
    await addMask(request);
  }
  const abort = new AbortController();
  const entries = [...Array(count).keys()].map((index) => ({ index, seed: seed + index, url: null }));
  shown = { abort, entries, id: null };
  const run = shown;
  const choose = (entry) => {
    if (!entry.url) return;
    markVariation(entry);
    run.index = entry.index;
    stage.picture(entry.url);
    if (run.job) showResult(run.job, actions, entry.index);
  };
  stage.shape(request.width ?? about.sizes.width, request.height ?? about.sizes.height);
  stage.begin({ isClip: false });
  stage.status("The canvas fills in …");
  drawVariations(entries, choose);
  const path = edits ? "v1/images/edits" : "v1/images/generations";
  const body = edits ? { form: asForm(request) } : { json: request };
  for await (const { data } of events(path, { method: "POST", ...body, signal: abort.signal })) {
    if (data.error) throw new Error(data.error.message);
    takePicture(run, data, choose);
  }
  if (shown !== run) return;
  stage.end();
  stage.status(count > 1 ? `Done: ${plural(count, "picture")}.` : "Done.");
  run.job = await jobOf(run.id);
  stage.shape(run.job.settings.width, run.job.settings.height);
  remember(run.id);
  showResult(run.job, actions, run.index ?? 0);
  await drawHistory(actions);
}

function takePicture(run, data, choose) {
  if (shown !== run) return;
  run.id = data.id;
  const index = data.image ?? 0, entry = run.entries[index];
  const url = `data:image/${data.output_format ?? "png"};base64,${data.b64_json}`;
  if (!$("variations").hidden) entry.node.firstChild.replaceWith(el("img", { src: url, alt: "" }));
  if (data.type.endsWith("completed")) {
    entry.url = url;
    if (index === 0) choose(entry);
  } else if (index === 0) {
    $("bar").value = 25 * (data.partial_image_index + 1);
    stage.picture(url);
  }
}

// Live -----------------------------------------------------------------------------------------------------------------

const liveFps = (request) => request?.fps ?? about.defaults.fps;

function startLive(words) {
  if (!canStream) throw new Error("This browser cannot play a clip while it grows: expected one with Media Source Extensions");
  if (form.seed.value === "") words.seed = randomSeed();
  else words.seed = form.firstSeed;
  const session = openLive(words);
  $("live-prompt").value = words.prompt;
  session.start(words);
}

function openLive(request) {
  stage.shape(request.width ?? about.sizes.width, request.height ?? about.sizes.height);
  stage.begin({ endless: true });
  stage.status("The first frame fills in …");
  const session = new LiveSession(stage, {
    fps: liveFps(request),
    onid: (id) => watchLive(id, session),
    onerror: fail,
    onend: (id) => endLive(id).catch(fail),
  });
  shown = { session, id: null, motion: request.motion_flow };
  const motion = typeof request.motion_flow === "number" ? request.motion_flow : about.defaults.motion_flow;
  $("live-motion").value = motion;
  $("live-motion-value").textContent = $("live-motion").value;
  $("live-problems").replaceChildren();
  show($("live"), true);
  show($("variations"), false);
  return session;
}

/** Shows the sets of a session beside its clip; the socket has the clip itself. */
function watchLive(id, session) {
  if (shown?.session !== session || shown.id === id) return;
  remember(id);
  shown.id = id;
  shown.abort = new AbortController();
  const { signal } = shown.abort;
  follow(id, stage, { signal, withVideo: false, onstatus: (job) => {
    showControls(job);
    if (hasEnded(job)) session.close();
    if (hasEnded(job)) endLive(id).catch(fail);
  } }).catch(fail);
}

async function endLive(id) {
  if (shown?.id !== id || shown.ended) return;
  shown.ended = true;
  const job = await untilEnded(id);
  show($("controls"), false);
  await showEnded(job);
  await drawHistory(actions);
}

/** The socket may tell of the end before the file is there. */
async function untilEnded(id) {
  for (let tries = 0; ; tries += 1) {
    const job = await jobOf(id);
    if (hasEnded(job) || tries > 100) return job;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

function changeSentence() {
  const prompt = $("live-prompt").value.trim();
  if (!prompt) return;
  shown.session.change({ prompt }, prompt);
}

function changeMotion() {
  const motion = Number($("live-motion").value);
  shown.session.change({ motion }, `Motion ${motion}`);
}

// Taking up, leaving, and the list -------------------------------------------------------------------------------------

/** After a reload: what still runs is shown again. */
async function takeUp(running) {
  const session = running.find((job) => job.kind === "session");
  if (session && ids()[0] === session.id) {
    resumeLive(session);
    return;
  }
  const clips = running.filter((job) => job.kind === "video").reverse();
  if (clips.length) watch(clips.map((job) => ({ id: job.id, seed: job.request.seed, done: false })));
  else if (session) resumeLive(session);
}

function resumeLive(job) {
  leave();
  const session = openLive({ ...job.settings, ...job.request });
  const prompt = Array.isArray(job.request.prompt) ? job.request.prompt.at(-1)[1] : job.request.prompt;
  $("live-prompt").value = (job.changes ?? []).filter((change) => change.values.prompt).at(-1)?.values.prompt ?? prompt ?? "";
  session.resume(job.id, "now");
  watchLive(job.id, session);
}

/** Stops looking at what the stage shows; the server goes on with clips, and pauses a session that nobody watches. */
function leave() {
  shown?.abort?.abort();
  shown?.session?.close();
  shown = null;
  for (const id of ["controls", "variations", "live"]) show($(id), false);
}

const actions = {
  async show(id) {
    showError(null);
    const job = await jobOf(id).catch(fail);
    if (!job) return;
    leave();
    if (job.kind === "session" && !hasEnded(job)) {
      resumeLive(job);
    } else if (job.kind === "image" && job.status === "completed") {
      await showPictures(job);
    } else {
      shown = { id, entries: [] };
      await watchOne({ id, seed: job.request.seed, done: false }).catch(fail);
    }
    $("screen").scrollIntoView({ block: "nearest" });
  },

  async use(job) {
    const mode = modeOf(job);
    const name = ["image", "video"].find((each) => each in job.inputs);
    const given = name ? await inputOf(job, name) : null;
    form.fill(mode, job.request, given);
    $("form").scrollIntoView({ block: "start" });
  },

  async goOn(job) {
    form.fill("continue", { ...job.request, prompt: lastSentence(job), strength: undefined, num_frames: undefined, seconds: undefined }, await resultOf(job));
    $("form").scrollIntoView({ block: "start" });
  },

  async edit(job, index = 0) {
    form.fill("edit", { ...job.request, prompt: lastSentence(job) }, await resultOf(job, index));
    $("form").scrollIntoView({ block: "start" });
  },

  async remove(job) {
    forget(job.id);
    if (shown?.id === job.id) {
      leave();
      stage.clear();
      stage.status("");
    }
    await call(`v1/jobs/${job.id}`, { method: "DELETE" }).catch((error) => {
      if (error.status !== 404) throw error;
    });
    await drawHistory(actions);
  },
};

const lastSentence = (job) => (Array.isArray(job.request.prompt) ? job.request.prompt.at(-1)[1] : job.request.prompt);

async function resultOf(job, index = 0) {
  return { blob: await contentOf(job, index), name: fileName(job, index), id: job.id };
}

async function showPictures(job) {
  const count = job.request.num_images_per_prompt ?? 1;
  const entries = [...Array(count).keys()].map((index) => ({ index, seed: job.request.seed + index }));
  shown = { id: job.id, entries, job };
  const choose = async (entry) => {
    markVariation(entry);
    await showEnded(job, null, entry.index);
    showResult(job, actions, entry.index);
  };
  drawVariations(entries, (entry) => choose(entry).catch(fail));
  await choose(entries[0]);
}

main().catch(fail);
