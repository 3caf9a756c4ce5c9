// Two small charts in SVG: level over time with its changes, and a line without axes.

import { write } from './dom.js';

const SVG = 'http://www.w3.org/2000/svg';
const MINUTES = 3;
const GAP = 5;  // seconds without a sample that break the line: the server or this tab was away

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export class Chart {
  // eventText and ago: words for an event and for an age in seconds.
  constructor(svg, readout, eventText, ago) {
    this.svg = svg;
    this.readout = readout;
    this.eventText = eventText;
    this.ago = ago;
    this.samples = [];  // {time, level, mean}: the target, and the mean level of what runs
    this.events = [];
    this.pointer = null;
    svg.addEventListener('pointermove', (event) => this.point(event));
    svg.addEventListener('pointerdown', (event) => this.point(event));
    svg.addEventListener('pointerleave', () => {
      this.pointer = null;
      this.draw();
    });
    new ResizeObserver(() => this.draw()).observe(svg);  // also when its view is shown
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
    const { width, height } = this.svg.getBoundingClientRect();
    if (!width || !this.samples.length) return;
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
    let line = '';
    let area = '';
    let mean = '';
    let start = 0;
    let open = false;
    this.samples.forEach((sample, index) => {
      const at = Math.max(left, x(sample.time));
      const next = this.samples[index + 1];
      if (index === 0 || sample.time - this.samples[index - 1].time > GAP) {
        start = line.length;
        open = false;
        area += `M${at} ${bottom}`;
        line += `M${at} ${y(sample.level)}`;
      } else {
        line += `H${at}V${y(sample.level)}`;
      }
      if (!next || next.time - sample.time > GAP) {
        if (!next) line += `H${right}`;
        area += `${line.slice(start).replace('M', 'L')}V${bottom}Z`;
      }
      const seen = sample.mean !== null && x(sample.time) >= left;
      if (seen) mean += `${open ? 'L' : 'M'}${x(sample.time)} ${y(sample.mean)}`;
      open = seen;
    });
    const parts = [shape('path', { class: 'area', d: area }), shape('path', { class: 'line', d: line })];
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
    write(this.readout, text);
    const summary = `Level over the last ${MINUTES} minutes, now ${last.level}; ${counts}`;
    if (this.svg.getAttribute('aria-label') !== summary) this.svg.setAttribute('aria-label', summary);
  }
}

export class Spark {
  constructor(svg, points = 120) {
    this.svg = svg;
    this.points = points;
    this.values = [];
    new ResizeObserver(() => this.draw()).observe(svg);
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > this.points) this.values.shift();
    this.draw();
  }

  draw() {
    const { width, height } = this.svg.getBoundingClientRect();
    if (!width || !this.values.length) return;
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
