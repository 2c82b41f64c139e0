import { checked } from "./requests.js";

// Strings from the checkpoint or a file are inserted as text (textContent), never as markup.
const $ = (id) => document.getElementById(id);
const CELLS = ["top left", "top right", "bottom left", "bottom right"];
const SVG = "http://www.w3.org/2000/svg";

let network = null; // the description of the network, from /network
let prediction = null; // the last prediction: the JSON of the response, with labels, confidence and uncertainty
let onlyClass = null; // the only class that is shown; null for all
let cursor = null; // {x, y}: the position of the keyboard cursor
let explained = null; // the explanation of a pixel: the JSON of the response, with its maps of contributions
let lastRequest = 0; // the number of the last request; responses to older ones are dropped

const element = (name, className, text) => {
  const created = document.createElement(name);
  if (className) created.className = className;
  if (text !== undefined) created.textContent = text;
  return created;
};
const percent = (share, digits = 1) =>
  share > 0 && 100 * share < 0.5 * 10 ** -digits ? `< ${10 ** -digits} %` : `${(100 * share).toFixed(digits)} %`;
const swatch = (index) => {
  const clear = index === network.background; // of the overlay, which shows the image there
  const created = element("span", clear ? "swatch clear" : "swatch");
  if (!clear) created.style.background = `rgb(${network.classes[index].colour.join(",")})`;
  return created;
};

// Requests

function showError(message) {
  $("error").textContent = message || "";
  $("error").hidden = !message;
}

async function predict(file) {
  if (!file || !network) return;
  showError("");
  if (file.size > network.max_bytes) {
    showError(`this file is larger than ${network.max_bytes >> 20} MB - reduce it, or use the command predict`);
    return;
  }
  const number = ++lastRequest;
  document.body.classList.add("busy");
  try {
    const response = await checked(
      fetch("look", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } }),
    );
    const content = await response.arrayBuffer();
    if (number === lastRequest) await show(content);
  } catch (error) {
    if (number === lastRequest) showError(error.message);
  } finally {
    if (number === lastRequest) document.body.classList.remove("busy");
  }
}

// Display

async function show(content) {
  const length = new DataView(content).getUint32(0, true);
  const decoded = JSON.parse(new TextDecoder().decode(new Uint8Array(content, 4, length)));
  const pixels = decoded.height * decoded.width;
  let offset = 4 + length;
  const next = (bytes) => content.slice(offset, (offset += bytes));
  decoded.labels = new Uint8Array(next(pixels));
  decoded.confidence = new Uint16Array(next(2 * pixels));
  decoded.uncertainty = new Uint8Array(next(pixels));
  const bitmap = await createImageBitmap(new Blob([content.slice(offset)], { type: "image/png" }));
  prediction = decoded;
  onlyClass = cursor = null;
  for (const name of ["image", "classes", "uncertainty"]) {
    $(name).width = prediction.width;
    $(name).height = prediction.height;
  }
  $("image").getContext("2d").drawImage(bitmap, 0, 0);
  $("path").setAttribute("viewBox", `0 0 ${prediction.width} ${prediction.height}`);
  $("welcome").hidden = true;
  $("result").hidden = false;
  clearPixel();
  paintClasses();
  paintUncertainty();
  showLayer();
  showLegend();
  showDetails();
  fit();
  showReadout(null);
}

function paint(id, colour) {
  const context = $(id).getContext("2d");
  const data = context.createImageData(prediction.width, prediction.height);
  const rgba = new Uint32Array(data.data.buffer); // little-endian: ABGR
  for (let pixel = 0; pixel < rgba.length; pixel++) rgba[pixel] = colour(pixel);
  context.putImageData(data, 0, 0);
}

function paintClasses() {
  const table = network.classes.map(({ colour: [r, g, b] }) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0);
  const { labels } = prediction;
  const drawn = network.classes.map((_, index) =>
    onlyClass === null ? index !== network.background : index === onlyClass,
  );
  const onOutline = $("outlines").checked ? outlines() : null;
  paint("classes", (pixel) => (drawn[labels[pixel]] && (!onOutline || onOutline[pixel]) ? table[labels[pixel]] : 0));
}

// The pixels with another class in the square around them, as predict --outlines draws them.
function outlines() {
  const { labels, height, width } = prediction;
  const thickness = Math.max(1, Math.floor((Math.max(height, width) + 250) / 500));
  const least = new Uint8Array(labels.length), most = new Uint8Array(labels.length);
  const found = new Uint8Array(labels.length);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      let low = 255, high = 0;
      const last = at + Math.min(thickness, width - 1 - x);
      for (let other = at - Math.min(thickness, x); other <= last; other++) {
        if (labels[other] < low) low = labels[other];
        if (labels[other] > high) high = labels[other];
      }
      least[at] = low;
      most[at] = high;
    }
  }
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      const last = at + width * Math.min(thickness, height - 1 - y);
      for (let other = at - width * Math.min(thickness, y); other <= last; other += width) {
        if (least[other] < labels[at] || most[other] > labels[at]) found[at] = 1;
      }
    }
  }
  return found;
}

function paintUncertainty() {
  // The colours of predict: from black through red to pale yellow.
  const table = Array.from({ length: 256 }, (_, value) => {
    const t = value / 255;
    const r = Math.min(255, 380 * t), g = Math.max(0, 380 * t - 150), b = Math.max(0, 560 * t - 390);
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  });
  paint("uncertainty", (pixel) => table[prediction.uncertainty[pixel]]);
}

function showLayer() {
  const selected = document.querySelector("input[name=layer]:checked").value;
  for (const name of ["classes", "uncertainty"]) {
    $(name).hidden = name !== selected || Boolean(explained);
    $(name).style.opacity = $("opacity").value / 100;
  }
  $("contributions").hidden = !explained;
  $("outlines").disabled = selected !== "classes";
}

function fit() {
  if (!prediction) return;
  const room = $("left").clientWidth, height = Math.max(240, window.innerHeight - 215);
  let scale = Math.min(room / prediction.width, height / prediction.height);
  if (scale > 3) scale = Math.floor(scale); // small images are enlarged by a whole number
  $("stage").style.width = `${Math.round(scale * prediction.width)}px`;
  $("stage").style.height = `${Math.round(scale * prediction.height)}px`;
  $("stage").classList.toggle("pixels", scale > 3);
}

function showLegend() {
  const present = prediction.areas.map((share, index) => ({ share, index })).filter(({ share }) => share > 0);
  present.sort((a, b) => b.share - a.share);
  $("legend").replaceChildren(
    ...present.map(({ share, index }) => {
      const button = element("button");
      button.type = "button";
      button.title = "Show only this class";
      button.setAttribute("aria-pressed", "false");
      button.append(
        swatch(index), element("span", "name", network.classes[index].name), element("span", "share", percent(share)),
      );
      button.addEventListener("click", () => {
        onlyClass = onlyClass === index ? null : index;
        for (const other of $("legend").querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-pressed", String(onlyClass === index));
        paintClasses();
      });
      const item = element("li");
      item.append(button);
      return item;
    }),
  );
  const absent = network.classes.filter((_, index) => !prediction.areas[index]).map(({ name }) => name);
  $("absent").textContent = absent.length ? `Not predicted: ${absent.join(", ")}` : "";
}

function showDetails() {
  const [height, width] = prediction.network_size;
  const size = `${prediction.width}×${prediction.height} pixels`;
  const details = [`${size}, predicted at ${width}×${height} in ${prediction.seconds.toFixed(2)} s.`];
  if (prediction.reduced_from) {
    const [fullHeight, fullWidth] = prediction.reduced_from;
    const maximum = `${network.largest / 1e6} million pixels`;
    details.push(`Reduced from ${fullWidth}×${fullHeight} to the maximum of ${maximum}.`);
  }
  details.push(`Mean confidence: ${percent(prediction.mean_confidence)}.`);
  $("details").textContent = details.join(" ");
}

// Pixels

function showReadout(pixel) {
  if (!pixel) {
    $("readout").textContent = prediction.has_path
      ? "Point at a pixel; click to see the path of its switches." : "Point at a pixel.";
    return;
  }
  const at = pixel.y * prediction.width + pixel.x;
  const index = prediction.labels[at];
  $("readout").replaceChildren(
    swatch(index),
    element("span", "name", network.classes[index].name),
    ` ${percent(prediction.confidence[at] / 65535)} · uncertainty ${percent(prediction.uncertainty[at] / 255, 0)} · `,
    `x ${pixel.x}, y ${pixel.y}`,
  );
}

function pixelAt(event) {
  const box = $("stage").getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * prediction.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * prediction.height);
  return { x: Math.min(Math.max(x, 0), prediction.width - 1), y: Math.min(Math.max(y, 0), prediction.height - 1) };
}

function draw(name, attributes, className) {
  for (const layer of ["under", "over"]) {
    const shape = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    shape.setAttribute("class", `${layer} ${className || ""}`);
    $("path").append(shape);
  }
}

function clearPixel() {
  $("path").replaceChildren();
  $("pixel").hidden = true;
  if (prediction) showExplanation(null);
}

async function explain(pixel) {
  const { picture } = prediction;
  let explanation;
  try {
    explanation = await (await checked(fetch(`pixel?picture=${picture}&y=${pixel.y}&x=${pixel.x}`))).json();
  } catch (error) {
    showError(error.message);
    return;
  }
  if (prediction.picture !== picture) return;
  clearPixel();
  $("pixel").hidden = false;
  $("pixel-title").textContent = `Pixel x ${pixel.x}, y ${pixel.y}`;
  const classes = explanation.probabilities.map((share, index) => ({ share, index }));
  classes.sort((a, b) => b.share - a.share);
  $("probabilities").replaceChildren(
    ...classes.slice(0, 5).map(({ share, index }) => {
      const item = element("li"), bar = element("span", "bar"), fill = element("i");
      const name = element("span", "name");
      name.append(swatch(index), network.classes[index].name);
      fill.style.width = `${100 * share}%`;
      bar.append(fill);
      item.append(name, bar, element("span", "share", percent(share)));
      return item;
    }),
  );
  $("path-title").hidden = !explanation.path.length;
  $("steps").replaceChildren(
    ...explanation.path.map(({ pool, cell, share }) => {
      const item = element("li"), glyph = element("span", "window");
      for (let other = 0; other < 4; other++) glyph.append(element("i", other === cell ? "won" : ""));
      const name = element("span", "", `pool ${pool}: ${CELLS[cell]}`);
      item.append(glyph, name, element("span", "share", percent(share, 0)));
      return item;
    }),
  );
  $("path-end").textContent = "This network has no switches: its pools do not store the positions of their maxima.";
  const middle = [pixel.x + 0.5, pixel.y + 0.5];
  const size = Math.max(prediction.width, prediction.height) / 130;
  if (explanation.path.length) {
    const rectangle = ([left, top, right, bottom]) => ({ x: left, y: top, width: right - left, height: bottom - top });
    draw("rect", rectangle(explanation.path[0].window));
    for (const { box } of explanation.path) draw("rect", rectangle(box));
    const end = explanation.path.at(-1).place;
    const points = [middle, ...explanation.path.map(({ place }) => place)];
    draw("polyline", { points: points.map((point) => point.join(",")).join(" ") });
    draw("circle", { cx: end[0], cy: end[1], r: size });
    $("path-end").textContent =
      `From the deepest window down, each pool by majority vote of its channels (percentage: the channels that ` +
      `agree). The path ends at x ${Math.floor(end[0])}, y ${Math.floor(end[1])}.`;
  }
  draw("circle", { cx: middle[0], cy: middle[1], r: size / 2 });
}

// Explanation of the class of a pixel

async function explainClass() {
  const { picture } = prediction, { x, y } = cursor;
  $("explain").disabled = true;
  try {
    const response = await checked(fetch(`explanation?picture=${picture}&y=${y}&x=${x}`));
    const content = await response.arrayBuffer();
    if (prediction.picture !== picture || !cursor || cursor.x !== x || cursor.y !== y) return;
    const length = new DataView(content).getUint32(0, true);
    const decoded = JSON.parse(new TextDecoder().decode(new Uint8Array(content, 4, length)));
    const pixels = decoded.height * decoded.width;
    decoded.maps = decoded.explained.map((_, index) => new Int8Array(content, 4 + length + index * pixels, pixels));
    showExplanation(decoded);
  } catch (error) {
    showError(error.message);
  } finally {
    $("explain").disabled = false;
  }
}

function showExplanation(explanation) {
  explained = explanation;
  $("explained").hidden = !explained;
  $("explain").hidden = Boolean(explained);
  if (explained) {
    $("numbers").replaceChildren(
      ...explained.explained.map(({ name }, index) => {
        const label = element("label"), radio = element("input");
        Object.assign(radio, { type: "radio", name: "number", value: index, checked: index === 0 });
        radio.addEventListener("change", () => showNumber(index));
        label.append(radio, element("span", "", name));
        return label;
      }),
    );
    showNumber(0);
  }
  showLayer();
}

function showNumber(index) {
  const { name, logit, sum, levels } = explained.explained[index];
  const number = (value, digits) => Number(value.toPrecision(digits)).toString();
  $("sum").textContent = `Logit ${number(logit, 6)}, sum of the contributions ${number(sum, 6)}.`;
  const largest = Math.max(...Object.values(levels).map(Math.abs)) || 1;
  $("levels").replaceChildren(
    ...Object.entries(levels).map(([level, value]) => {
      const item = element("li"), bar = element("span", "bar"), fill = element("i", value > 0 ? "for" : "against");
      fill.style.width = `${(100 * Math.abs(value)) / largest}%`;
      bar.append(fill);
      item.append(element("span", "", level), bar, element("span", "share", (value > 0 ? "+" : "") + number(value, 3)));
      return item;
    }),
  );
  const limits = explained.limits ? ` ${explained.limits[0].toUpperCase()}${explained.limits.slice(1)}.` : "";
  $("signs").textContent =
    `In the image: red pixels raise ${name}, blue ones lower it, relative to the mean colour. Below “pixels”: the ` +
    `biases, by stage and scale of the map.${limits}`;
  paintContributions(explained.maps[index]);
}

// The colours of visualize --explain, over the image.
function paintContributions(values) {
  const canvas = $("contributions");
  canvas.width = explained.width;
  canvas.height = explained.height;
  const context = canvas.getContext("2d");
  const data = context.createImageData(explained.width, explained.height);
  for (let pixel = 0; pixel < values.length; pixel++) {
    const strength = Math.abs(values[pixel]) / 127, sign = values[pixel] > 0 ? [179, 69, 31] : [33, 94, 168];
    // A pale veil where contributions are zero, so that they are visible on dark and colourful images.
    data.data.set([...sign.map((channel) => 255 + strength * (channel - 255)), 140 + 115 * strength], 4 * pixel);
  }
  context.putImageData(data, 0, 0);
}

// Input

$("explain").addEventListener("click", explainClass);
$("stage").addEventListener("pointermove", (event) => prediction && showReadout(pixelAt(event)));
$("stage").addEventListener("pointerleave", () => prediction && showReadout(cursor));
$("stage").addEventListener("click", (event) => {
  if (!prediction) return;
  cursor = pixelAt(event);
  explain(cursor);
});
$("stage").addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key in moves) {
    const [across, down] = moves[event.key].map((step) => step * (event.shiftKey ? 10 : 1));
    const { x, y } = cursor || { x: prediction.width >> 1, y: prediction.height >> 1 };
    cursor = {
      x: Math.min(Math.max(x + across, 0), prediction.width - 1),
      y: Math.min(Math.max(y + down, 0), prediction.height - 1),
    };
    clearPixel();
    const size = Math.max(prediction.width, prediction.height) / 130;
    draw("circle", { cx: cursor.x + 0.5, cy: cursor.y + 0.5, r: size }, "cursor");
    showReadout(cursor);
  } else if (event.key === "Enter" && cursor) {
    explain(cursor);
  } else if (event.key.toLowerCase() === "e" && cursor && !event.ctrlKey && !event.metaKey && !event.altKey) {
    explain(cursor).then(explainClass);
  } else if (event.key === "Escape") {
    cursor = null;
    clearPixel();
    showReadout(null);
  } else {
    return;
  }
  event.preventDefault();
});
for (const radio of document.querySelectorAll("input[name=layer]")) {
  radio.addEventListener("change", () => showExplanation(null));
}
$("opacity").addEventListener("input", showLayer);
$("outlines").addEventListener("change", () => prediction && paintClasses());
$("file").addEventListener("change", (event) => {
  predict(event.target.files[0]);
  event.target.value = ""; // allows choosing the same file again
});
document.addEventListener("paste", (event) => predict(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  predict(event.dataTransfer.files[0]);
});
window.addEventListener("resize", fit);

checked(fetch("network"))
  .then((response) => response.json())
  .then((content) => {
    network = content;
    $("network").textContent = `${network.network}, ${network.classes.length} classes`;
    document.body.dataset.ready = "true";
  })
  .catch((error) => showError(error.message));
