// The photo on the stage: tiles at the scale of the screen, the mask over them, and the strokes.

const MAX_ZOOM = 32; // screen pixels for a pixel of the photo
const MAX_TILES = 120;

export class Stage {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.strokes = document.createElement("canvas");
    this.photo = null;
    this.scale = 1; // screen pixels (of the device) for a pixel of the photo
    this.x = this.y = 0; // of the photo's corner, in screen pixels
    this.tiles = new Map();
    this.mask = null; // {canvas, uncertain}: the proposal or the accepted mask
    this.colours = new Map();
    this.opacity = 0.4;
    this.hidden = this.uncertain = false;
    this.pending = null; // the stroke that is being drawn
    this.cursor = null; // {x, y, radius} in pixels of the photo
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(this.canvas.clientWidth * ratio));
    const height = Math.max(1, Math.round(this.canvas.clientHeight * ratio));
    if (width === this.canvas.width && height === this.canvas.height) return;
    const fitted = this.fitted;
    this.canvas.width = this.strokes.width = width;
    this.canvas.height = this.strokes.height = height;
    if (fitted !== false) this.fit();
    this.draw();
  }

  open(photo) {
    this.photo = photo;
    this.tiles.clear();
    this.mask = this.pending = null;
    this.fit();
  }

  fit() {
    if (!this.photo) return;
    const margin = 16;
    const { width, height } = this.canvas;
    this.scale = Math.min((width - margin) / this.photo.width, (height - margin) / this.photo.height, MAX_ZOOM);
    this.x = (width - this.scale * this.photo.width) / 2;
    this.y = (height - this.scale * this.photo.height) / 2;
    this.fitted = true;
    this.draw();
  }

  zoom(factor, x = this.canvas.width / 2, y = this.canvas.height / 2) {
    const scale = Math.min(MAX_ZOOM, Math.max(0.01, this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.draw();
  }

  move(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.fitted = false;
    this.draw();
  }

  // The position of a pointer event in pixels of the photo.
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.canvas.width / box.width;
    return [((event.clientX - box.left) * ratio - this.x) / this.scale, ((event.clientY - box.top) * ratio - this.y) / this.scale];
  }

  showMask(maps) {
    if (!maps) {
      this.mask = null;
      return this.draw();
    }
    const size = { width: maps.width, height: maps.height };
    const paint = (colour) => {
      const canvas = Object.assign(document.createElement("canvas"), size);
      const context = canvas.getContext("2d");
      const data = context.createImageData(size.width, size.height);
      const rgba = new Uint32Array(data.data.buffer); // little-endian: ABGR
      for (let pixel = 0; pixel < rgba.length; pixel++) rgba[pixel] = colour(pixel);
      context.putImageData(data, 0, 0);
      return canvas;
    };
    const table = new Uint32Array(256);
    for (const [label, [r, g, b]] of this.colours) table[label] = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
    const heat = (value) => {
      const t = value / 255; // from black through red to pale yellow, as predict draws it
      const r = Math.min(255, 380 * t), g = Math.max(0, 380 * t - 150), b = Math.max(0, 560 * t - 390);
      return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
    };
    this.mask = {
      maps,
      canvas: paint((pixel) => table[maps.labels[pixel]]),
      uncertain: maps.uncertainty ? paint((pixel) => heat(maps.uncertainty[pixel])) : null,
    };
    this.draw();
  }

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.paint();
    });
  }

  paint() {
    const { context, canvas, photo } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!photo) return;
    context.imageSmoothingEnabled = this.scale < 3;
    this.paintTiles();
    if (!this.hidden) {
      const layer = this.mask && (this.uncertain && this.mask.uncertain ? this.mask.uncertain : this.mask.canvas);
      if (layer) {
        context.globalAlpha = this.uncertain ? Math.max(0.6, this.opacity) : this.opacity;
        context.imageSmoothingEnabled = false;
        context.drawImage(layer, this.x, this.y, this.scale * photo.width, this.scale * photo.height);
        context.globalAlpha = 1;
      }
      this.paintStrokes();
    }
    this.paintCursor();
  }

  paintTiles() {
    const { photo, tile } = this;
    const level = Math.max(0, Math.min(12, Math.floor(Math.log2(1 / this.scale) + 0.25)));
    // A coarse level below, so that nothing is empty while the tiles arrive.
    const coarse = Math.max(level, Math.ceil(Math.log2(Math.max(photo.width, photo.height) / tile)));
    for (const each of coarse > level ? [coarse, level] : [level]) {
      const side = tile * 2 ** each; // of a tile in pixels of the photo
      const first = [Math.max(0, Math.floor(-this.x / this.scale / side)), Math.max(0, Math.floor(-this.y / this.scale / side))];
      const end = [
        Math.min(Math.ceil(photo.width / side), Math.ceil((this.canvas.width - this.x) / this.scale / side)),
        Math.min(Math.ceil(photo.height / side), Math.ceil((this.canvas.height - this.y) / this.scale / side)),
      ];
      for (let row = first[1]; row < end[1]; row++) for (let column = first[0]; column < end[0]; column++) {
        const image = this.tileImage(each, row, column);
        if (!image.complete || !image.naturalWidth) continue;
        const factor = 2 ** each * this.scale;
        const x = this.x + column * side * this.scale, y = this.y + row * side * this.scale;
        this.context.drawImage(image, x, y, image.naturalWidth * factor, image.naturalHeight * factor);
      }
    }
  }

  tileImage(level, row, column) {
    const key = `${level},${row},${column}`;
    let image = this.tiles.get(key);
    if (!image) {
      image = new Image();
      image.onload = () => this.draw();
      image.src = `tile?number=${this.photo.number}&level=${level}&row=${row}&column=${column}`;
      this.tiles.set(key, image);
      if (this.tiles.size > MAX_TILES) this.tiles.delete(this.tiles.keys().next().value);
    }
    return image;
  }

  paintStrokes() {
    const { photo } = this;
    const context = this.strokes.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.strokes.width, this.strokes.height);
    context.setTransform(this.scale, 0, 0, this.scale, this.x, this.y);
    const accepted = photo.status === "accepted"; // then the mask has the strokes
    const drawn = accepted ? photo.entries.slice(this.mask ? this.mask.maps.entries : 0) : photo.entries;
    for (const stroke of drawn) this.paintStroke(context, stroke);
    if (this.pending) this.paintStroke(context, this.pending);
    this.context.globalAlpha = 0.85;
    this.context.drawImage(this.strokes, 0, 0);
    this.context.globalAlpha = 1;
  }

  paintStroke(context, stroke) {
    const colour = stroke.class === null ? [0, 0, 0] : this.colours.get(stroke.class);
    if (!colour) return;
    context.globalCompositeOperation = stroke.class === null ? "destination-out" : "source-over";
    context.strokeStyle = context.fillStyle = `rgb(${colour.join(",")})`;
    if (stroke.tool === "brush") {
      context.lineCap = context.lineJoin = "round";
      context.lineWidth = 2 * stroke.radius;
      context.beginPath();
      const [[x, y], ...rest] = stroke.points;
      context.moveTo(x, y);
      if (!rest.length) context.lineTo(x + 0.01, y);
      for (const point of rest) context.lineTo(...point);
      context.stroke();
    } else if (stroke.tool === "polygon") {
      context.beginPath();
      for (const ring of stroke.rings) {
        ring.forEach((point, index) => (index ? context.lineTo(...point) : context.moveTo(...point)));
        if (!stroke.open) context.closePath();
      }
      if (stroke.open) {
        context.lineWidth = 2.5 / this.scale;
        context.stroke();
      } else context.fill("evenodd");
    }
    context.globalCompositeOperation = "source-over";
  }

  paintCursor() {
    if (!this.cursor) return;
    const { context } = this;
    const x = this.x + this.cursor.x * this.scale, y = this.y + this.cursor.y * this.scale;
    const ratio = window.devicePixelRatio || 1;
    const radius = Math.max(2 * ratio, (this.cursor.radius || 0) * this.scale);
    for (const [width, colour] of [[3, "#0009"], [1.4, "#fff"]]) {
      context.lineWidth = width * ratio;
      context.strokeStyle = colour;
      context.beginPath();
      if (this.cursor.radius) context.arc(x, y, radius, 0, 7);
      else {
        const arm = 9 * ratio;
        context.moveTo(x - arm, y); context.lineTo(x + arm, y);
        context.moveTo(x, y - arm); context.lineTo(x, y + arm);
      }
      context.stroke();
    }
  }
}
