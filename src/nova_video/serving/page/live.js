// A live session: a clip without end over one socket, whose sentence and motion change while it plays.

import { askForKey, ApiError, socket } from "./api.js";
import { $, el, show } from "./dom.js";

const PING = 1000; // milliseconds between two words about how far it has played
const REFUSED = 1008; // the code of a socket that the server closes for a reason of its own
const PAUSES = [500, 1000, 2000, 4000, 8000];

export class LiveSession {
  /** `fps` frames a second are played. */
  constructor(stage, { fps, onid, onerror, onend }) {
    Object.assign(this, { stage, fps, onid, onerror, onend });
    this.id = null;
    this.next = 0; // the fragment that is to come, or "now"
    this.tries = 0;
    this.over = false;
    this.changes = new Map();
    $("changes").replaceChildren();
  }

  start(words) {
    this.words = words;
    this.connect({ type: "session.start", format: "m4s", endless: true, ...words });
  }

  /** Takes up a session: after a reload from its newest frames on, after a lost connection where it was. */
  resume(id, first = this.next) {
    this.id = id;
    this.next = first;
    this.connect({ type: "session.resume", id, first: this.next });
  }

  connect(first) {
    this.stage.player.restart();
    const link = (this.link = socket("v1/realtime/video"));
    let opened = false;
    link.onopen = () => {
      opened = true;
      link.send(JSON.stringify(first));
      clearInterval(this.pinging);
      this.pinging = setInterval(() => this.ping(), PING);
    };
    link.onmessage = ({ data }) => {
      if (link !== this.link) return;
      this.tries = 0;
      if (typeof data === "string") this.take(JSON.parse(data));
      else this.stage.feed(data);
    };
    link.onclose = ({ code }) => {
      if (link === this.link) this.lost(opened, code);
    };
  }

  ping() {
    if (this.link.readyState !== WebSocket.OPEN) return;
    this.stage.player.catchUp();
    const played = Math.floor($("video").currentTime * this.fps);
    this.send({ type: "session.ping", ...(this.stage.hasVideo ? { played } : {}) });
  }

  send(message) {
    if (this.link.readyState === WebSocket.OPEN) this.link.send(JSON.stringify(message));
  }

  take(message) {
    const { type } = message;
    if (type === "video.start") {
      this.id = message.id;
      this.onid(message.id);
    } else if (type === "video.chunk_metadata") {
      if (Number.isInteger(message.number)) this.next = message.number + 1;
    } else if (type.startsWith("session.interaction.")) {
      this.tellChange(message, type.endsWith("in_effect"));
    } else if (type === "session.done") {
      this.close();
      this.onend(this.id);
    } else if (type === "error") {
      if (this.changes.has(message.event_id)) this.changes.get(message.event_id).lastChild.textContent = "refused";
      this.onerror(new ApiError(message.message, 400));
      if (!this.id) this.close();
    }
  }

  /** A connection that was lost is taken up again at the fragment that is missing; the server paused the session. */
  async lost(opened, code) {
    clearInterval(this.pinging);
    if (this.over) return;
    if (code === REFUSED) { // the server has said why
      this.close();
      return;
    }
    if (!this.id) {
      if (!opened && this.tries === 0) { // a browser does not say whether that was for lack of a key
        this.tries += 1;
        const answer = await fetch("v1/models").catch(() => null);
        if (answer?.status === 401) {
          await askForKey();
          this.start(this.words);
          return;
        }
      }
      this.close();
      this.onerror(new ApiError("The live session could not be started: the server closed the connection", 0));
      return;
    }
    if (this.tries >= 30) {
      this.close();
      this.onerror(new ApiError("The connection was lost. The session is kept: reload the page to take it up again", 0));
      return;
    }
    this.stage.status("The connection was lost. Trying again …");
    setTimeout(() => {
      if (!this.over) this.resume(this.id);
    }, PAUSES[Math.min(this.tries++, PAUSES.length - 1)]);
  }

  /** Asks for another sentence or motion, from the next possible frame on. */
  change(event, text) {
    const id = crypto.randomUUID();
    const node = el("li", {}, el("span", {}, text), el("span", {}, "asked for"));
    this.changes.set(id, node);
    $("changes").prepend(node);
    while ($("changes").children.length > 6) $("changes").lastChild.remove();
    this.send({ type: "session.interaction", interaction: { event_id: id, event } });
  }

  tellChange({ event_id: id, frame }, inEffect) {
    const node = this.changes.get(id);
    if (!node) return;
    const when = Number.isInteger(frame) ? ` from ${(frame / this.fps).toFixed(1)} s on` : "";
    node.lastChild.textContent = inEffect ? `in effect${when}` : `queued${when}`;
    node.classList.toggle("in", inEffect);
  }

  close() {
    this.over = true;
    clearInterval(this.pinging);
    this.link?.close();
    show($("live"), false);
  }
}
