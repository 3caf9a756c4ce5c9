// The live view: GET /v1/dsla twice a second, drawn as layers, level over time, throughput, memory and requests.

import { ApiError, call, hasKey } from './api.js';
import { startBurst } from './burst.js';
import { Chart, Spark } from './chart.js';
import { $, node, sentence, write } from './dom.js';

const PERIOD = 500;       // ms between two polls
const PERIOD_LOST = 2000;  // while the server does not answer
const MAX_ROWS = 6;
const MAX_EVENTS = 5;

function label(id, text) {
  if ($(id).getAttribute('aria-label') !== text) $(id).setAttribute('aria-label', text);
}

function bytes(value) {
  if (value < 1 << 20) return `${Math.round(value / 1024)} KiB`;
  if (value < 1 << 30) return `${(value / (1 << 20)).toFixed(value < 10 << 20 ? 1 : 0)} MiB`;
  return `${(value / (1 << 30)).toFixed(2)} GiB`;
}

function rate(value) {
  return value >= 100 ? Math.round(value).toLocaleString('en') : value.toFixed(1);
}

function ago(age) {
  if (age < 60) return `${Math.round(age)} s ago`;
  return `${Math.floor(age / 60)} min ago`;
}

// --- Layers ----------------------------------------------------------------------------------------------------------

function setCells(parent, count, level) {
  while (parent.children.length > count) parent.lastElementChild.remove();
  while (parent.children.length < count) parent.append(node('i'));
  for (let rank = 0; rank < count; ++rank) {
    parent.children[rank].classList.toggle('dsla', rank < level);
    parent.children[rank].classList.toggle('soft', rank >= level);
  }
}

function drawLayers(state) {
  const { layers, ladder, top } = state;
  const level = state.target;
  write($('target'), `Level ${level}`);
  write($('target-of'), `of ${layers}`);
  write($('policy'), `policy ${state.policy}`);
  write($('tab-level'), `Live · level ${level}`);
  setCells($('cells'), layers, level);
  ladder.forEach((layer, rank) => {
    const title = `Layer ${layer}, rank ${rank + 1} of the ladder: ${rank < level ? 'DSLA' : 'softmax'}`;
    const cell = $('cells').children[rank];
    if (cell.title !== title) cell.title = title;
    cell.classList.toggle('rung', rank === top);
  });
  label('cells', `New requests: ${level} of ${layers} layers are DSLA, ${layers - level} softmax`);
  const limit = state.maxLevel < top ? ` Auto goes up to level ${state.maxLevel} here.` : '';
  write($('ladder-note'), top ? `In ladder order, least sensitive first. The mark is the top rung, level ${top}.${limit}`
                              : 'This model has no adapter: every layer stays softmax.');
}

function drawRows(state) {
  let rows = state.rows.map((count, level) => ({ count, level })).filter((row) => row.count > 0);
  const hidden = rows.length - MAX_ROWS;
  if (hidden > 0) {
    // The fullest levels, in order of level again.
    rows = rows.sort((a, b) => b.count - a.count).slice(0, MAX_ROWS).sort((a, b) => a.level - b.level);
  }
  const list = $('rows');
  list.querySelectorAll('.none').forEach((item) => item.remove());
  while (list.children.length > rows.length) list.lastElementChild.remove();
  while (list.children.length < rows.length) {
    const item = node('li');
    item.append(node('span', 'count'), node('span', 'cells small'), node('span', 'at'));
    list.append(item);
  }
  rows.forEach((row, index) => {
    const [count, cells, at] = list.children[index].children;
    write(count, `${row.count} ×`);
    setCells(cells, state.layers, row.level);
    write(at, `level ${row.level}`);
  });
  if (!rows.length) list.append(node('li', 'none', 'Nothing is running.'));
  if (hidden > 0) list.append(node('li', 'none', `and ${hidden} more level${hidden === 1 ? '' : 's'}`));
  write($('load'), state.running || state.queued ? `${state.running} running, ${state.queued} waiting` : '');
}

// --- Events ----------------------------------------------------------------------------------------------------------

function eventText(event) {
  if (!event.request) return `Level ${event.from} → ${event.to}`;
  return `${event.count > 1 ? `${event.count} running requests` : 'A running request'} ${event.from} → ${event.to}`;
}

// The policy's own words, with its short ones spelt out.
function reasonText(reason) {
  const words = { ttft: 'time to first token', tpot: 'time per token' };
  return sentence((reason ?? '').replace(/^(ttft|tpot)(?=:)/, (word) => words[word]));
}

// Requests raised by one decision become one line.
function merged(events) {
  const lines = [];
  for (const event of events) {
    const last = lines[lines.length - 1];
    if (last?.request && event.request && last.from === event.from && last.to === event.to && event.time - last.time < 2) {
      last.count += 1;
    } else {
      lines.push({ ...event, count: 1 });
    }
  }
  return lines;
}

let shownEvents = '';
function drawEvents(state) {
  const last = state.events.slice(-MAX_EVENTS).reverse();
  const signature = last.map((event) => `${event.request}${event.from}-${event.to}-${event.count}`).join('|');
  const list = $('events');
  if (signature !== shownEvents || !list.children.length) {
    shownEvents = signature;
    list.replaceChildren(...last.map((event, index) => {
      const item = node('li');
      item.append(node('b', '', eventText(event)), node('time'));
      // Raises follow a change of level for the same reason, which stands there.
      if (event.reason && event.reason !== last[index + 1]?.reason) item.append(node('p', '', reasonText(event.reason)));
      return item;
    }));
    if (!last.length) list.append(node('li', 'none', 'No change yet.'));
  }
  last.forEach((event, index) => {
    write(list.children[index].children[1], ago(Math.max(0, state.time - event.time)));
  });
}

// --- Memory and requests ---------------------------------------------------------------------------------------------

function drawMemory(state) {
  const parts = [
    ['pages', 'KV pages', state.memory.pages],
    ['states', 'DSLA states', state.memory.states],
    ['prefix', 'Prefix cache', state.memory.prefix],
    ['free', 'Free', Math.max(0, state.memory.budget - state.memory.pages - state.memory.states - state.memory.prefix)],
  ];
  const bar = $('memory');
  const split = $('memory-split');
  if (!bar.children.length) {
    for (const [name, text] of parts) {
      bar.append(node('i', name));
      const item = node('li');
      item.append(node('span', `key ${name}`), node('span', '', text), node('b'));
      split.append(item);
    }
  }
  parts.forEach(([, , value], index) => {
    bar.children[index].style.flexGrow = state.memory.budget ? value / state.memory.budget : 0;
    write(split.children[index].lastElementChild, bytes(value));
  });
  write($('budget'), `${bytes(state.memory.budget)} in all`);
  label('memory', parts.map(([, text, value]) => `${text} ${bytes(value)}`).join(', '));
}

function drawFacts(state) {
  const share = state.promptTokens ? Math.round((100 * state.cachedTokens) / state.promptTokens) : 0;
  const facts = [
    ['Running', String(state.running)],
    ['Waiting', String(state.queued)],
    ['Oldest waits', state.queued ? `${state.oldestWait.toFixed(1)} s` : '–'],
    ['Finished', state.finished.toLocaleString('en')],
    ['Read from cache', `${share}%`],
    ['Pre-empted', state.preemptions.toLocaleString('en')],
  ];
  const list = $('facts');
  if (!list.children.length) {
    for (const [name] of facts) {
      const item = node('div');
      item.append(node('dt', '', name), node('dd'));
      list.append(item);
    }
  }
  facts.forEach(([, value], index) => {
    write(list.children[index].lastElementChild, value);
  });
}

// --- Polling ---------------------------------------------------------------------------------------------------------

// From the server's words to the page's. `time`: this page's clock in seconds; the server's events give their age.
function read(json, time) {
  const { ladder, controller, running, queue, memory, totals, throughput } = json;
  const changes = json.events.map((event) => ({
    time: time - event.age_seconds,
    request: event.request_id,
    from: event.from,
    to: event.to,
    reason: event.reason,
  }));
  return {
    time,
    model: json.model,
    ladder: ladder.layers,
    layers: ladder.layers.length,
    top: ladder.top_level,
    highest: ladder.max_level,
    target: controller.target_level,
    maxLevel: controller.max_level,
    policy: controller.policy,
    draining: json.draining,
    rows: running.by_level,
    running: running.count,
    queued: queue.requests,
    oldestWait: queue.oldest_wait_seconds,
    memory: { budget: memory.budget_bytes, pages: memory.page_bytes, states: memory.state_bytes, prefix: memory.prefix_cache_bytes },
    decode: throughput.decode_tokens_per_second,
    prefill: throughput.prefill_tokens_per_second,
    promptTokens: totals.prompt_tokens,
    cachedTokens: totals.cached_tokens,
    finished: totals.finished,
    preemptions: totals.preemptions,
    changes,
    events: merged(changes),
  };
}

// Without an answer the last state stays in view, and says how old it is.
function showStale(seen, text) {
  $('live').toggleAttribute('data-stale', Boolean(text));
  $('stale').hidden = !text;
  if (!text) return;
  const since = seen ? ` since ${seen.toLocaleTimeString('en-GB')}. What is shown is from then` : '';
  write($('stale'), `${text}${since}.`);
  write($('tab-level'), 'Live');
}

export function startLive({ setStatus, setLadder, noteRaises, askForKey }) {
  const chart = new Chart($('chart'), $('readout'), (event) => `${eventText(event)}. ${reasonText(event.reason)}`, ago);
  const decode = new Spark($('decode-spark'));
  const prefill = new Spark($('prefill-spark'));
  let timer = 0;
  let polling = false;
  let seen = null;  // when the last answer came

  const lost = (status, text) => {
    setStatus(status, text);
    showStale(seen, text);
  };

  const draw = (state) => {
    setLadder(state.layers, state.top, state.highest);
    noteRaises(state.changes);
    write($('model'), state.model);
    $('model').title = state.model;
    drawLayers(state);
    drawRows(state);
    drawEvents(state);
    drawMemory(state);
    drawFacts(state);
    write($('decode'), rate(state.decode));
    write($('prefill'), rate(state.prefill));
    decode.push(state.decode);
    prefill.push(state.prefill);
    chart.push(state);
    setStatus(state.draining ? 'wait' : 'live', state.draining ? 'Shutting down' : 'Live');
    seen = new Date();
    showStale(seen, '');
  };

  const poll = async () => {
    if (polling) return;
    polling = true;
    let next = PERIOD;
    try {
      draw(read(await (await call('v1/dsla')).json(), performance.now() / 1000));
    } catch (error) {
      next = PERIOD_LOST;
      if (!(error instanceof ApiError)) {
        console.error(error);  // an answer that is not what this page knows: another version, a proxy
        lost('lost', 'Answer not understood');
      } else if (error.status === 401) {
        lost('lost', hasKey() ? 'The key is refused' : 'Needs a key');
        askForKey();
        next = 0;  // until a key is given
      } else if (error.status === 503) {
        lost('wait', 'Loading the model');
      } else {
        lost('lost', error.status ? `Server error ${error.status}` : 'Not reachable');
      }
    }
    polling = false;
    if (next && !document.hidden) timer = setTimeout(poll, next);
  };
  const now = () => {
    clearTimeout(timer);
    poll();
  };
  document.addEventListener('visibilitychange', () => {
    if (!document.hidden) now();
  });
  startBurst();
  poll();
  return { now };
}
