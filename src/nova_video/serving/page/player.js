// Plays a clip while it grows: fragments of mp4 go into the browser's Media Source one after another.

const KEEP_BEHIND = 30; // seconds of what was played that a clip without end holds

const Source = globalThis.MediaSource ?? globalThis.ManagedMediaSource; // the second is that of iPhones

/** This browser can play a clip while it grows. */
export const canStream = Boolean(Source);

export class Player {
  constructor(video) {
    this.video = video;
    this.queue = [];
    this.buffer = null;
    this.ended = false;
    this.endless = false;
    this.url = null;
    this.rest = new Uint8Array(0);
  }

  /** Begins a new clip. */
  open({ endless = false, loop = true } = {}) {
    this.close();
    this.endless = endless;
    this.ended = false;
    this.rest = new Uint8Array(0);
    this.source = new Source();
    this.video.disableRemotePlayback = true; // iPhones ask for it
    this.url = URL.createObjectURL(this.source);
    this.opened = new Promise((resolve) => this.source.addEventListener("sourceopen", resolve, { once: true }));
    this.video.loop = false;
    this.video.onended = () => {
      if (loop && this.ended) this.replay();
    };
    this.video.src = this.url;
  }

  /** Plays a whole file. */
  play(blob, loop) {
    this.close();
    this.url = URL.createObjectURL(blob);
    this.video.onended = null;
    this.video.loop = loop;
    this.video.src = this.url;
    if (loop) this.start();
  }

  /** The stream begins again with its head, as after a lost connection. */
  restart() {
    this.rest = new Uint8Array(0);
  }

  start() {
    this.video.play().catch(() => {}); // a browser that lets nothing play by itself shows its button
  }

  replay() {
    this.video.currentTime = 0;
    this.start();
  }

  /** Takes a piece of the stream, of any length; whole boxes go on to the browser. */
  feed(data) {
    const joined = new Uint8Array(this.rest.length + data.byteLength);
    joined.set(this.rest);
    joined.set(new Uint8Array(data), this.rest.length);
    let end = 0;
    for (const box of boxes(joined)) {
      end = box.end;
      if (box.name === "moov") this.codec = codecOf(joined);
    }
    if (end) this.push(joined.slice(0, end));
    this.rest = joined.slice(end);
  }

  async push(bytes) {
    const source = this.source;
    this.queue.push(bytes);
    await this.opened;
    if (source !== this.source || source.readyState !== "open") return;
    if (!this.buffer && this.codec) {
      this.buffer = source.addSourceBuffer(`video/mp4; codecs="${this.codec}"`);
      this.buffer.addEventListener("updateend", () => this.pump());
    }
    this.pump();
  }

  pump() {
    const buffer = this.buffer;
    if (!buffer || buffer.updating || this.source.readyState !== "open") return;
    if (this.endless) this.catchUp();
    const time = this.video.currentTime;
    if (this.endless && buffer.buffered.length && time - buffer.buffered.start(0) > 2 * KEEP_BEHIND) {
      buffer.remove(0, time - KEEP_BEHIND);
      return;
    }
    const next = this.queue.shift();
    if (next) {
      buffer.appendBuffer(next);
      return;
    }
    if (this.ended) this.source.endOfStream();
  }

  /** The stream is whole. */
  end() {
    this.ended = true;
    this.pump();
  }

  /** Seconds of the clip that are there. */
  get seconds() {
    const ranges = this.video.buffered;
    return ranges.length ? ranges.end(ranges.length - 1) : 0;
  }

  /** Jumps over a hole: what a viewer who came later, or lagged, has not got. */
  catchUp() {
    const ranges = this.video.buffered;
    for (let index = 0; index < ranges.length; index += 1) {
      if (ranges.start(index) > this.video.currentTime + 0.05) {
        this.video.currentTime = ranges.start(index);
        return;
      }
      if (ranges.end(index) > this.video.currentTime + 0.05) return;
    }
  }

  close() {
    this.queue = [];
    this.buffer = null;
    this.source = null;
    this.codec = null;
    this.video.onended = null;
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = null;
    this.video.removeAttribute("src");
    this.video.load();
  }
}

function* boxes(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 0; at + 8 <= bytes.length;) {
    const size = view.getUint32(at);
    if (size < 8 || at + size > bytes.length) return;
    yield { name: String.fromCharCode(...bytes.subarray(at + 4, at + 8)), end: at + size };
    at += size;
  }
}

/** The codec's name, such as avc1.64000C, read off the head of the stream. */
function codecOf(bytes) {
  for (let at = 0; at + 8 <= bytes.length; at += 1) {
    if (bytes[at] === 97 && bytes[at + 1] === 118 && bytes[at + 2] === 99 && bytes[at + 3] === 67) {
      const profile = [...bytes.subarray(at + 5, at + 8)];
      return `avc1.${profile.map((byte) => byte.toString(16).padStart(2, "0").toUpperCase()).join("")}`;
    }
  }
  return null;
}
