// A burst of requests from the page itself, so that one visitor can see the level rise and fall again. Browsers open few
// connections to one server, so that each request carries many prompts.

import { ApiError, call, events } from './api.js';
import { $, announce, sentence } from './dom.js';

const CONNECTIONS = 3;
const PROMPTS = 8;  // of one request
const WORDS = 900;
const REPLY = 96;  // tokens

const VOCABULARY = `the old harbour town wakes slowly while fishing boats return with silver nets and gulls circle above
 grey roofs a baker opens blue shutters children run along narrow walls toward school books under their arms somewhere a
 clock strikes seven market women arrange apples bread cheese and flowers on long wooden tables merchants argue about
 prices of salt rope timber an engineer measures water levels beside rusty gates then writes careful numbers in her
 notebook every evening ships leave for distant islands carrying letters tools seeds and stories`.split(/\s+/);

// Different in every prompt, so that no two share more than their first words in the prefix cache.
function prompt() {
  const words = [];
  for (let i = 0; i < WORDS; ++i) words.push(VOCABULARY[Math.floor(Math.random() * VOCABULARY.length)]);
  return `Notes: ${words.join(' ')}.\nThe main points of these notes are:`;
}

let stopper = null;

async function send(signal, progress) {
  const body = {
    prompt: Array.from({ length: PROMPTS }, prompt),
    max_tokens: REPLY,
    temperature: 0.8,
    service_tier: 'auto',
    stream: true,
  };
  const response = await call('v1/completions', { body, signal });
  for await (const event of events(response)) {
    for (const choice of event.choices ?? []) {
      if (choice.finish_reason) progress();
    }
  }
}

async function burst() {
  if (stopper) {
    stopper.abort();
    return;
  }
  stopper = new AbortController();
  const { signal } = stopper;
  const total = CONNECTIONS * PROMPTS;
  const started = performance.now();
  let done = 0;
  $('burst').textContent = 'Stop the burst';
  const show = () => {
    $('burst-note').textContent = `${done} of ${total} requests are finished.`;
  };
  show();
  const ends = await Promise.allSettled(Array.from({ length: CONNECTIONS }, () => send(signal, () => {
    ++done;
    show();
  })));
  const failed = ends.find((end) => end.status === 'rejected');
  const took = ((performance.now() - started) / 1000).toFixed(1);
  let end = `All ${total} requests were finished in ${took} s.`;
  if (signal.aborted) end = 'The burst is stopped.';
  else if (failed) end = failed.reason instanceof ApiError ? sentence(failed.reason.message) : String(failed.reason);
  $('burst-note').textContent = end;
  announce(end);
  $('burst').textContent = 'Send a burst';
  stopper = null;
}

export function startBurst() {
  $('burst').addEventListener('click', burst);
}
