// Follows a job while it runs: its events, and its clip as it grows. Lost connections are taken up again.

import { call, events } from "./api.js";
import { progressText } from "./stage.js";

const ENDED = ["completed", "failed", "cancelled"];
const PAUSES = [500, 1000, 2000, 4000, 8000];

export const hasEnded = (job) => ENDED.includes(job.status);
const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Shows a job on the stage until it has ended, and returns what the server last said of it. */
export async function follow(id, stage, { signal, onstatus, onevent, withVideo = true }) {
  const streaming = withVideo ? stream(id, stage, signal) : Promise.resolve();
  streaming.catch(() => {}); // it is waited for below, where the events have ended well
  let job = null;
  await again(signal, async () => {
    for await (const { type, data } of events(`v1/videos/${id}/events?previews=true`, { signal })) {
      if (type === "status") {
        job = data;
        stage.status(progressText(job));
        onstatus?.(job);
      } else if (type === "set") {
        stage.set(data);
      }
      onevent?.(type, data);
    }
    return job !== null && hasEnded(job);
  }, (text) => stage.status(text));
  if (job?.status === "completed") await streaming;
  return job;
}

/** Feeds the growing clip to the player. After a lost connection it begins anew: the bytes that are there are left out. */
async function stream(id, stage, signal) {
  let taken = 0;
  await again(signal, async () => {
    const answer = await call(`v1/videos/${id}/live.mp4`, { signal });
    const reader = answer.body.getReader();
    for (let at = 0; ;) {
      const { value, done } = await reader.read();
      if (done) return true;
      const fresh = value.subarray(Math.min(value.length, Math.max(0, taken - at)));
      at += value.length;
      if (fresh.length) stage.feed(fresh);
      taken = Math.max(taken, at);
    }
  });
}

/** Does something until it says that it is done, after longer and longer pauses where the connection was lost. */
async function again(signal, act, tell = () => {}) {
  for (let tries = 0; ; tries += 1) {
    try {
      if (await act()) return;
    } catch (error) {
      if (error.name === "AbortError" || signal?.aborted) throw error;
      if (error.status >= 400 && error.status < 500) throw error;
      if (tries >= 60) throw error;
      if (tries > 1) tell("The connection was lost. Trying again …");
    }
    await wait(PAUSES[Math.min(tries, PAUSES.length - 1)]);
    if (signal?.aborted) throw new DOMException("left", "AbortError");
  }
}
