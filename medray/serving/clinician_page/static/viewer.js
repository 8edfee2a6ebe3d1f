// An image on a canvas: zoom, move, window and level.

const WHOLE = { level: 127.5, width: 255, inverted: false };

// What each of the 256 grey values is shown as: linear within the window, black below and white above.
export function lookup({ level, width, inverted }) {
  const shown = new Uint8ClampedArray(256);
  for (let value = 0; value < 256; value += 1) {
    const bright = ((value - (level - width / 2)) / width) * 255;
    shown[value] = inverted ? 255 - Math.min(255, Math.max(0, bright)) : bright;
  }
  return shown;
}

export class Viewer {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed; // called after every change of the view
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.image = null;
    this.dragsWindow = false;
    this.pointers = new Map();
    this.reset();
    new ResizeObserver(() => this.later()).observe(canvas);
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("dblclick", () => this.reset());
    canvas.addEventListener("keydown", (event) => this.arrow(event));
  }

  async show(blob) {
    this.image?.close();
    this.image = null;
    if (blob) this.image = await createImageBitmap(blob);
    this.reset();
  }

  reset() {
    Object.assign(this, WHOLE, { zoom: 1, x: 0, y: 0 }); // x, y: of the image's middle from the canvas's, in CSS pixels
    this.later();
  }

  set(values) {
    Object.assign(this, values);
    this.level = Math.min(255, Math.max(0, this.level));
    this.width = Math.min(510, Math.max(1, this.width));
    this.later();
  }

  // Zoom by a factor so that the point of the image under (x, y), from the canvas's middle, stays there.
  zoomBy(factor, x = 0, y = 0) {
    const zoom = Math.min(32, Math.max(0.5, this.zoom * factor));
    const ratio = zoom / this.zoom;
    this.set({ zoom, x: x - (x - this.x) * ratio, y: y - (y - this.y) * ratio });
  }

  later() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = null;
      this.draw();
    });
    this.changed?.(this);
  }

  draw() {
    const { canvas, context, image } = this;
    const dense = window.devicePixelRatio || 1;
    const size = [canvas.clientWidth * dense, canvas.clientHeight * dense].map(Math.round);
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (!image || !canvas.width || !canvas.height) return;
    const scale = Math.min(canvas.width / image.width, canvas.height / image.height) * this.zoom;
    const [width, height] = [image.width * scale, image.height * scale];
    const left = (canvas.width - width) / 2 + this.x * dense;
    const top = (canvas.height - height) / 2 + this.y * dense;
    context.imageSmoothingEnabled = scale < 8; // single pixels are to be seen as such
    context.imageSmoothingQuality = "high";
    context.drawImage(image, left, top, width, height);
    if (this.level !== WHOLE.level || this.width !== WHOLE.width || this.inverted) this.window(left, top, width, height);
  }

  window(left, top, width, height) {
    const [x0, y0] = [Math.max(0, Math.floor(left)), Math.max(0, Math.floor(top))];
    const [x1, y1] = [Math.min(this.canvas.width, Math.ceil(left + width)), Math.min(this.canvas.height, Math.ceil(top + height))];
    if (x1 <= x0 || y1 <= y0) return;
    const part = this.context.getImageData(x0, y0, x1 - x0, y1 - y0);
    const shown = lookup(this);
    const data = part.data;
    for (let at = 0; at < data.length; at += 4) {
      data[at] = shown[data[at]];
      data[at + 1] = shown[data[at + 1]];
      data[at + 2] = shown[data[at + 2]];
    }
    this.context.putImageData(part, x0, y0);
  }

  fromMiddle(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
  }

  wheel(event) {
    event.preventDefault();
    this.zoomBy(Math.exp(-Math.sign(event.deltaY) * Math.min(Math.abs(event.deltaY), 100) / 400), ...this.fromMiddle(event));
  }

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.fromMiddle(event));
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const here = this.fromMiddle(event);
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.pointers.set(event.pointerId, here);
    if (other) this.pinch(before, here, other);
    else if (this.dragsWindow || event.buttons & 2) this.set({ width: this.width + here[0] - before[0], level: this.level + here[1] - before[1] });
    else this.set({ x: this.x + here[0] - before[0], y: this.y + here[1] - before[1] });
  }

  pinch(before, here, other) {
    const apart = (point) => Math.max(1, Math.hypot(point[0] - other[0], point[1] - other[1]));
    this.set({ x: this.x + (here[0] - before[0]) / 2, y: this.y + (here[1] - before[1]) / 2 });
    this.zoomBy(apart(here) / apart(before), (here[0] + other[0]) / 2, (here[1] + other[1]) / 2);
  }

  arrow(event) {
    const step = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.set({ x: this.x + step[0], y: this.y + step[1] });
  }
}
