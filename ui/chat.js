// The conversation: what is sent, the streaming reply, and what it cost.

import { ApiError, call, events } from './api.js';
import { $, announce, node, sentence } from './dom.js';
import { Markdown } from './markdown.js';

const FILE_LIMIT = 1 << 20;

const HINTS = {
  auto: 'The server sets the level by its load.',
  full: 'Every layer stays softmax attention.',
  economy: 'The top rung of the ladder from the start.',
};

const ADVICE = {
  context_length_exceeded: 'Clear the conversation, or ask for a shorter reply under Options.',
};

const view = { levels: null, top: 0 };  // null: not known yet
let conversation = [];  // {role, content}, as the API takes them: each question with its answer
let attached = null;    // {name, text}
let running = null;     // {reply, render, abort}: of the reply being written
let askForKey = () => {};

// --- The log --------------------------------------------------------------------------------------------------------

function atBottom() {
  const log = $('log');
  return log.scrollHeight - log.scrollTop - log.clientHeight < 48;
}

function toBottom() {
  $('log').scrollTop = $('log').scrollHeight;
}

function addMessage(role, label) {
  const article = node('article', `message ${role}`);
  article.setAttribute('aria-label', label);
  $('messages').append(article);
  $('welcome').hidden = true;
  $('clear').disabled = false;
  return article;
}

function showUser(text, file) {
  const article = addMessage('user', 'You');
  if (file) article.append(node('p', 'file', `${file.name}, ${file.text.length.toLocaleString('en')} characters`));
  article.append(node('p', 'said', text));
  toBottom();
}

// --- What the reply cost ---------------------------------------------------------------------------------------------

function seconds(value) {
  return value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
}

// One bar, cut where the level changed, each piece as much DSLA as its level.
function levelTrack(levels, total) {
  const track = node('div', 'track');
  levels.forEach((span, index) => {
    const end = index + 1 < levels.length ? levels[index + 1].at : total;
    const piece = node('i');
    piece.style.flexGrow = Math.max(end - span.at, 1);
    piece.style.setProperty('--share', `${view.levels ? (100 * span.level) / view.levels : 0}%`);
    piece.title = `Level ${span.level}`;
    track.append(piece);
  });
  return track;
}

function describeLevels(levels) {
  return levels
    .map((span, index) => (index ? `level ${span.level} from token ${span.at}` : `Level ${span.level}`))
    .join(', then ');
}

function showCost(cost, reply) {
  const facts = [];
  if (reply.levels.length) facts.push(describeLevels(reply.levels));
  facts.push(`${reply.tokens} token${reply.tokens === 1 ? '' : 's'}`);
  if (reply.first) facts.push(`the first after ${seconds((reply.first - reply.start) / 1000)}`);
  if (reply.tokens > 1 && reply.last > reply.first) {
    facts.push(`${(((reply.tokens - 1) * 1000) / (reply.last - reply.first)).toFixed(1)} tokens/s`);
  }
  if (reply.usage) {
    const cached = reply.usage.prompt_tokens_details?.cached_tokens ?? 0;
    facts.push(`${reply.usage.prompt_tokens} tokens read${cached ? `, ${cached} of them cached` : ''}`);
  }
  if (reply.finish === 'length') facts.push('cut at the longest reply');
  if (reply.stopped) facts.push(reply.text ? 'stopped' : 'stopped before it began, left out of the conversation');
  const line = node('p');
  line.append(...facts.flatMap((fact, index) => {
    const part = node('span', '', index + 1 < facts.length ? `${fact} ·` : fact);
    return index ? [' ', part] : [part];
  }));
  cost.replaceChildren(line);
  if (reply.levels.length) cost.prepend(levelTrack(reply.levels, Math.max(reply.tokens, 1)));
}

// Only over HTTPS and on this machine does a browser lend its clipboard.
function offerCopy(cost, text) {
  if (!navigator.clipboard) return;
  const copy = node('button', 'quiet copy', 'Copy');
  copy.type = 'button';
  copy.addEventListener('click', async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = 'Copied';
    announce('Copied.');
    setTimeout(() => { copy.textContent = 'Copy'; }, 1500);
  });
  cost.append(copy);
}

// --- One reply -------------------------------------------------------------------------------------------------------

function requestBody(messages) {
  const tier = document.querySelector('input[name=tier]:checked').value;
  const body = {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: Math.max(1, Number($('max-tokens').value) || 400),
    temperature: Math.min(2, Math.max(0, Number($('temperature').value) || 0)),
  };
  if (tier === 'exact') body.dsla = { level: Number($('level').value) };
  else body.service_tier = { auto: 'auto', full: 'priority', economy: 'flex' }[tier];
  return body;
}

// The level history of the usage. Positions count the prompt too, and what happened while it was read is part of the
// start.
function takeLevels(reply) {
  reply.levels = [];
  for (const span of reply.usage.dsla?.levels ?? []) {
    const at = Math.max(0, span.position - reply.usage.prompt_tokens);
    if (at === 0) reply.levels.length = 0;
    reply.levels.push({ at, level: span.level });
  }
}

// Changes that the live view saw. A stream tells its level at its first token and at its end; these are the raises
// between, as near as a poll comes.
export function noteRaises(changes) {
  const reply = running?.reply;
  if (!reply?.id) return;
  for (const change of changes) {
    if (change.request?.startsWith(reply.id) && change.to > (reply.levels.at(-1)?.level ?? 0)) {
      reply.levels.push({ at: reply.tokens, level: change.to });
      running.render();
    }
  }
}

async function stream(reply, body, signal, render) {
  const response = await call('v1/chat/completions', { body, signal });
  reply.id = response.headers.get('x-request-id');
  const level = response.headers.get('x-dsla-level');
  if (level !== null) reply.levels.push({ at: 0, level: Number(level) });
  for await (const event of events(response)) {
    if (event.usage) reply.usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) continue;
    if (choice.finish_reason) reply.finish = choice.finish_reason;
    const text = choice.delta?.content;
    if (text) {
      reply.last = performance.now();
      reply.first ||= reply.last;
      reply.tokens += 1;
      reply.text += text;
      render();
    }
  }
  if (!reply.usage) return;
  reply.tokens = reply.usage.completion_tokens;
  takeLevels(reply);
}

function showFailure(article, error, retry) {
  const box = node('div', 'failure');
  box.setAttribute('role', 'alert');
  let text = error instanceof ApiError ? sentence(error.message) : `The page failed: ${error.message}`;
  if (error.retryAfter) text += ` Try again in ${Math.ceil(error.retryAfter)}\u00a0s.`;
  if (ADVICE[error.code]) text += ` ${ADVICE[error.code]}`;
  box.append(node('p', '', text));
  const again = node('button', 'quiet retry', 'Try again');
  again.type = 'button';
  again.addEventListener('click', () => {
    $('send').focus({ preventScroll: true });  // the button goes, the focus stays at hand
    article.remove();
    retry();
  });
  box.append(again);
  article.append(box);
}

// What a failed answer offers holds until something else is asked: a question without an answer is no part of the
// conversation, as templates want the two in turn.
function dropRetry() {
  $('messages').querySelector('.retry')?.replaceWith(node('p', 'note', 'Left out of the conversation.'));
}

async function answer(question) {
  const mine = conversation;  // Clear begins another one
  const article = addMessage('assistant', 'Model');
  const body = node('div', 'body');
  const wait = node('p', 'wait', 'Reading');
  const cost = node('footer', 'cost');
  article.append(body, wait, cost);
  toBottom();
  const markdown = new Markdown(body);
  const reply = {
    id: '', text: '', tokens: 0, levels: [], usage: null, finish: '', stopped: false,
    start: performance.now(), first: 0, last: 0,
  };
  let scheduled = false;
  const paint = () => {
    scheduled = false;
    const follow = atBottom();
    wait.remove();
    markdown.update(reply.text);
    showCost(cost, reply);
    if (follow) toBottom();
  };
  const render = () => {
    if (!scheduled) requestAnimationFrame(() => scheduled && paint());
    scheduled = true;
  };
  const controller = new AbortController();
  running = { reply, render, abort: () => controller.abort() };
  busy(true);
  announce('The model is reading.');
  const system = $('system').value.trim();
  const messages = [...(system ? [{ role: 'system', content: system }] : []), ...mine, question];
  let failed = null;
  try {
    await stream(reply, requestBody(messages), controller.signal, render);
  } catch (error) {
    if (error.name === 'AbortError') reply.stopped = true;
    else failed = error;
  }
  running = null;
  busy(false);
  if (mine !== conversation) return;
  paint();
  article.dataset.done = 'true';
  if (reply.text) offerCopy(cost, reply.text);
  if (failed) {
    if (!reply.text) cost.remove();
    showFailure(article, failed, () => answer(question));
    if (failed.status === 401) askForKey();
  } else {
    if (reply.text) mine.push(question, { role: 'assistant', content: reply.text });
    announce(reply.stopped ? 'Stopped.' : reply.text);
  }
  toBottom();
}

// --- The form --------------------------------------------------------------------------------------------------------

function busy(on) {
  const focused = document.activeElement;
  $('send').hidden = on;
  $('stop').hidden = !on;
  // A button that vanishes must not take the focus with it. On a touch screen the prompt would bring up the keyboard.
  if (on && focused === $('send')) $('stop').focus({ preventScroll: true });
  if (!on && focused === $('stop')) {
    (matchMedia('(pointer: coarse)').matches ? $('send') : $('prompt')).focus({ preventScroll: true });
  }
}

function fit() {
  const prompt = $('prompt');
  prompt.style.height = 'auto';
  prompt.style.height = `${Math.min(prompt.scrollHeight, window.innerHeight * 0.35)}px`;
}

function attach(file) {
  attached = file;
  $('attached').hidden = !file;
  $('attached-name').textContent = file ? `${file.name}, ${Math.ceil(file.text.length / 1024)} KB` : '';
}

async function readFile(file) {
  if (!file) return;
  if (file.size > FILE_LIMIT) {
    announce(`${file.name} is larger than 1 MB.`);
    $('tier-hint').textContent = `${file.name} is larger than 1 MB.`;
    return;
  }
  attach({ name: file.name, text: await file.text() });
  $('prompt').focus();
}

function send(text) {
  if (running) return;
  if (!text && !attached) {
    $('prompt').focus();
    return;
  }
  const question = text || 'Summarise this text.';
  const content = attached ? `${attached.text}\n\n${question}` : question;
  dropRetry();
  showUser(question, attached);
  attach(null);
  $('prompt').value = '';
  fit();
  answer({ role: 'user', content });
}

function clear() {
  running?.abort();
  conversation = [];
  $('messages').replaceChildren();
  $('welcome').hidden = false;
  $('clear').disabled = true;
  announce('The conversation is cleared.');
  $('prompt').focus();
}

function exactHint(level) {
  const beyond = level > view.top ? `, beyond the top rung of ${view.top}: quality drops` : '';
  return `${level} of ${view.levels} layers are DSLA throughout${beyond}.`;
}

function showTier() {
  const tier = document.querySelector('input[name=tier]:checked').value;
  const level = Number($('level').value);
  $('exact').hidden = tier !== 'exact';
  $('tier-hint').textContent = HINTS[tier] ?? exactHint(level);
  $('level-out').textContent = level;
}

function startOptions() {
  const options = $('options');
  document.addEventListener('pointerdown', (event) => {
    if (!options.contains(event.target)) options.open = false;
  });
  options.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || !options.open) return;
    event.stopPropagation();  // it stops no reply
    options.open = false;
    options.querySelector('summary').focus();
  });
}

// A log that is at its end stays there when its room changes: a phone's keyboard, a longer message being typed.
function keepBottom() {
  const log = $('log');
  const size = () => `${log.clientWidth} ${log.clientHeight}`;
  let wasAtBottom = true;
  let last = size();
  log.addEventListener('scroll', () => {
    if (size() === last) wasAtBottom = atBottom();  // else the room changed, and nobody scrolled
  });
  new ResizeObserver(() => {
    if (wasAtBottom) toBottom();
    last = size();
  }).observe(log);
}

// What the server says of itself, as it becomes known.
export function setLadder(layers, top, highest) {
  if (view.levels === layers && view.top === top) return;
  view.levels = layers;
  view.top = top;
  $('level').max = highest;
  if (!Number($('level').value)) $('level').value = top;
  // Without an adapter there is one level: none to choose, and none to see rise.
  for (const part of [$('tiers'), $('tier-hint'), $('burst-row')]) part.hidden = highest === 0;
  showTier();
}

export function startChat(onKeyNeeded) {
  askForKey = onKeyNeeded;
  $('composer').addEventListener('submit', (event) => {
    event.preventDefault();
    send($('prompt').value.trim());
  });
  $('prompt').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send($('prompt').value.trim());
    }
  });
  $('prompt').addEventListener('input', fit);
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape' && running && !$('key-dialog').open) running.abort();
  });
  $('stop').addEventListener('click', () => running?.abort());
  $('clear').addEventListener('click', clear);
  $('attach').addEventListener('click', () => $('file').click());
  $('detach').addEventListener('click', () => attach(null));
  $('file').addEventListener('change', () => {
    readFile($('file').files[0]);
    $('file').value = '';
  });
  $('tiers').addEventListener('change', showTier);
  $('level').addEventListener('input', showTier);
  for (const idea of $('ideas').children) idea.addEventListener('click', () => send(idea.textContent));
  startOptions();
  keepBottom();
  showTier();
}
