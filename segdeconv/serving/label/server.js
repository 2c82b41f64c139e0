// Requests to the server. Strings from it are inserted as text (textContent), never as markup.

import { checked } from "./requests.js";

export const get = async (path) => (await checked(fetch(path))).json();

// Changes are sent one after the other, so that they are stored in the order in which they were made.
let last = Promise.resolve();
export function change(path, content) {
  const sent = last.then(() => post(path, content));
  last = sent.catch(() => {});
  return sent;
}

export async function post(path, content) {
  const headers = { "Content-Type": "application/json" };
  return (await checked(fetch(path, { method: "POST", headers, body: JSON.stringify(content) }))).json();
}

// Maps of labels: the length of the JSON in four bytes, the JSON, and (height, width) bytes for each map.
export async function maps(path) {
  const response = await checked(fetch(path));
  if (response.status === 204) return null;
  const content = await response.arrayBuffer();
  const length = new DataView(content).getUint32(0, true);
  const decoded = JSON.parse(new TextDecoder().decode(new Uint8Array(content, 4, length)));
  const pixels = decoded.height * decoded.width;
  decoded.labels = new Uint8Array(content, 4 + length, pixels);
  if (content.byteLength >= 4 + length + 2 * pixels) decoded.uncertainty = new Uint8Array(content, 4 + length + pixels, pixels);
  return decoded;
}
