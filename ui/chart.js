// Two small charts in SVG: level over time with its changes, and a line without axes.

const SVG = 'http://www.w3.org/2000/svg';
const MINUTES = 3;

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function sizeOf(svg) {
  const box = svg.getBoundingClientRect();
  return { width: Math.max(80, box.width), height: Math.max(20, box.height) };
}

export class Chart {
  // eventText and ago: words for an event and for an age in seconds.
  constructor(svg, readout, eventText, ago) {
    this.svg = svg;
    this.readout = readout;
    this.eventText = eventText;
    this.ago = ago;
    this.minutes = MINUTES;
    this.samples = [];  // {time, level, running}
    this.events = [];
    this.pointer = null;
    svg.addEventListener('pointermove', (event) => this.point(event));
    svg.addEventListener('pointerdown', (event) => this.point(event));
    svg.addEventListener('pointerleave', () => {
      this.pointer = null;
      this.draw();
    });
  }

  push(state) {
    const rows = state.rows;
    let count = 0;
    let sum = 0;
    rows.forEach((n, level) => {
      count += n;
      sum += n * level;
    });
    this.samples.push({ time: state.time, level: state.target, mean: count ? sum / count : null });
    const oldest = state.time - MINUTES * 60;
    // One sample before the window stays, for the line to begin at its edge.
    while (this.samples.length > 1 && this.samples[1].time < oldest) this.samples.shift();
    this.events = state.events.filter((event) => event.time >= oldest);
    this.now = state.time;
    this.layers = Math.max(1, state.layers);
    this.top = state.top;
    this.draw();
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    this.pointer = { x: event.clientX - box.left, y: event.clientY - box.top };
    this.draw();
  }

  draw() {
    const { width, height } = sizeOf(this.svg);
    if (!this.samples.length) return;
    const left = 22;
    const right = width - 6;
    const top = 8;
    const bottom = height - 18;
    const x = (time) => right - ((this.now - time) / (MINUTES * 60)) * (right - left);
    const y = (level) => bottom - (level / this.layers) * (bottom - top);
    const parts = [];
    const grid = (level, name) => {
      parts.push(shape('line', { class: name, x1: left, x2: right, y1: y(level), y2: y(level) }));
      const text = shape('text', { x: left - 6, y: y(level) + 3.5, 'text-anchor': 'end' });
      text.textContent = level;
      parts.push(text);
    };
    grid(0, 'axis');
    if (this.top > 0 && this.top < this.layers) grid(this.top, 'grid top');
    grid(this.layers, 'grid');
    for (let minute = 0; minute <= MINUTES; ++minute) {
      const text = shape('text', { x: x(this.now - minute * 60), y: height - 4, 'text-anchor': minute === 0 ? 'end' : minute === MINUTES ? 'start' : 'middle' });
      text.textContent = minute ? `−${minute} min` : 'now';
      parts.push(text);
    }
    parts.push(...this.lines(x, y, left, right, bottom));
    const near = this.nearest(x, y);
    // Changes of level last, above the raises that came with them.
    const order = [...this.events].sort((a, b) => Boolean(b.request) - Boolean(a.request));
    for (const event of order) {
      parts.push(shape('circle', {
        class: `event ${event.request ? 'raise' : 'target'}${event === near ? ' near' : ''}`,
        cx: x(event.time),
        cy: y(event.to),
        r: event === near ? 5 : event.request ? 2.5 : 4,
      }));
    }
    this.svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    this.svg.replaceChildren(...parts);
    this.describe(near);
  }

  // The target as steps over an area, the mean level of the running requests as a thin line.
  lines(x, y, left, right, bottom) {
    let steps = '';
    let previous = null;
    for (const sample of this.samples) {
      const at = Math.max(left, x(sample.time));
      steps += previous === null ? `M${at} ${y(sample.level)}` : `H${at}V${y(sample.level)}`;
      previous = at;
    }
    const first = Math.max(left, x(this.samples[0].time));
    const parts = [
      shape('path', { class: 'area', d: `${steps}H${right}V${bottom}H${first}Z` }),
      shape('path', { class: 'line', d: `${steps}H${right}` }),
    ];
    let mean = '';
    let open = false;
    for (const sample of this.samples) {
      if (sample.mean !== null && x(sample.time) >= left) mean += `${open ? 'L' : 'M'}${x(sample.time)} ${y(sample.mean)}`;
      open = sample.mean !== null && x(sample.time) >= left;
    }
    if (mean) parts.push(shape('path', { class: 'mean', d: mean }));
    return parts;
  }

  nearest(x, y) {
    if (!this.pointer) return null;
    let best = null;
    let distance = 24;
    for (const event of this.events) {
      const d = Math.hypot(x(event.time) - this.pointer.x, (y(event.to) - this.pointer.y) / 2);
      if (d < distance) [best, distance] = [event, d];
    }
    return best;
  }

  describe(near) {
    const last = this.samples[this.samples.length - 1];
    const changes = this.events.filter((event) => !event.request).length;
    const raises = this.events.reduce((sum, event) => sum + (event.request ? event.count : 0), 0);
    const counts = `${changes} change${changes === 1 ? '' : 's'} of level, ${raises} raise${raises === 1 ? '' : 's'} of running requests`;
    const text = near ? `${this.ago(this.now - near.time)}. ${this.eventText(near)}` : counts;
    if (this.readout.textContent !== text) this.readout.textContent = text;
    const summary = `Level over the last ${MINUTES} minutes, now ${last.level}; ${counts}`;
    if (this.svg.getAttribute('aria-label') !== summary) this.svg.setAttribute('aria-label', summary);
  }
}

export class Spark {
  constructor(svg, points = 120) {
    this.svg = svg;
    this.points = points;
    this.values = [];
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > this.points) this.values.shift();
    const { width, height } = sizeOf(this.svg);
    const most = Math.max(1, ...this.values);
    const step = width / (this.points - 1);
    const start = width - (this.values.length - 1) * step;
    const path = this.values
      .map((v, i) => `${i ? 'L' : 'M'}${(start + i * step).toFixed(1)} ${(height - 2 - (v / most) * (height - 4)).toFixed(1)}`)
      .join('');
    this.svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    this.svg.replaceChildren(
      shape('path', { class: 'area', d: `${path}V${height}H${start.toFixed(1)}Z` }),
      shape('path', { class: 'line', d: path }),
    );
  }
}
