// The screen: the frame that is being made, the clip that plays while it grows, and how far it is.

import { $, el, isCalm, plural, show } from "./dom.js";
import { canStream, Player } from "./player.js";
import { Strip } from "./strip.js";

const EMPTY = [0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 2, 0, 2, 1, 0, 1, 1, 2, 0, 0, 0, 2, 1, 0, 2, 1, 1, 0, 0, 0, 2, 1, 1, 0, 2, 1, 0, 1, 0, 2, 0, 1, 0, 0, 0, 0, 1, 0, 1, 2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0];

export class Stage {
  constructor(about) {
    this.player = new Player($("video"));
    this.strip = new Strip();
    const tokens = EMPTY.map((kind) => el("i", { className: ["", "lit", "warm"][kind] }));
    $("empty").append(el("div", { className: "tokens", "aria-hidden": "true" }, ...tokens), el("p", {}, "What you make is shown here, while it is made."));
    this.shape(about.sizes.width, about.sizes.height);
  }

  /** The screen has the shape of what is shown. */
  shape(width, height) {
    $("screen").style.aspectRatio = `${width} / ${height}`;
  }

  /** Makes room for something new: `frames` latent frames of it, if that is known. */
  begin({ frames = 0, isClip = true, endless = false } = {}) {
    this.hasVideo = false;
    this.isClip = isClip;
    show($("empty"), true);
    for (const id of ["video", "canvas", "next", "badge"]) show($(id), false);
    $("result").replaceChildren();
    show($("result"), false);
    this.strip.clear(isClip ? frames : 0);
    show($("bar"), !endless);
    $("bar").value = 0;
    $("video").controls = isCalm();
    this.endless = endless;
    this.player.close();
    if (isClip && canStream) this.player.open({ endless, loop: !isCalm() });
  }

  /** One more set of a frame is there. */
  set({ step, total, frame, set, sets, preview }) {
    if (total && !this.endless) $("bar").value = 100 * step / total;
    if (this.isClip) this.strip.fill(frame, set / sets, preview);
    if (!preview) return;
    const image = $(this.hasVideo ? "next" : "canvas");
    image.src = preview;
    show(image, true);
    show($("empty"), false);
  }

  /** A piece of the growing clip. */
  feed(data) {
    if (!canStream) return;
    this.player.feed(data);
    if (this.hasVideo) return;
    this.hasVideo = true;
    const video = $("video");
    video.addEventListener("loadeddata", () => {
      show(video, true);
      show($("canvas"), false);
      show($("empty"), false);
    }, { once: true });
    if (!isCalm()) this.player.start();
  }

  picture(url) {
    $("canvas").src = url;
    $("canvas").alt = "The picture";
    show($("canvas"), true);
    show($("empty"), false);
  }

  /** A finished clip, as a file. */
  play(blob) {
    this.hasVideo = true;
    show($("video"), true);
    for (const id of ["empty", "canvas", "next"]) show($(id), false);
    this.player.play(blob, !isCalm());
  }

  /** All is made. */
  end() {
    show($("bar"), false);
    show($("next"), false);
    this.badge("");
    $("video").controls = true;
    this.strip.finish();
    if (this.isClip && this.player.source) this.player.end();
  }

  clear() {
    this.begin({ isClip: false });
    show($("bar"), false);
  }

  badge(text, on = true) {
    $("badge").textContent = text;
    $("badge").classList.toggle("on", on);
    show($("badge"), Boolean(text));
  }

  status(text) {
    if ($("status").textContent !== text) $("status").textContent = text;
  }
}

/** How far a job is, in words. */
export function progressText(job) {
  if (job.status === "queued") return "Waiting for its turn …";
  if (job.paused) return `Paused. ${plural(job.frames, "frame")} so far.`;
  if (job.status === "in_progress") return job.frames ? `${plural(job.frames, "frame")} so far.` : "The first frame fills in …";
  if (job.status === "failed") return `It failed: ${job.error?.message ?? "the server does not say why"}`;
  if (job.status === "cancelled") return "Thrown away.";
  if (job.stopped) return `Stopped. ${plural(job.frames, "frame")} are kept.`;
  return "Done.";
}
