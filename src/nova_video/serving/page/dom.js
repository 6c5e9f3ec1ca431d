// Small helpers for elements. Text always goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties, attributes that begin with "data-", "aria-" or are named in `attributes`, and children. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && !name.startsWith("aria")) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const button = (text, onclick, className = "") => el("button", { type: "button", className, onclick }, text);

export function show(node, visible) {
  node.hidden = !visible;
}

/** Calls `act` once the calls have paused for so many milliseconds. */
export function debounce(act, pause) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...values), pause);
  };
}

export function showError(error) {
  const box = $("error");
  box.textContent = error ? (error.message ?? String(error)) : "";
  show(box, Boolean(error));
  if (error) box.scrollIntoView({ block: "nearest" });
}

export const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export const plural = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;

/** Gives the user a file to keep. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
