// Starts the page: theme, views, the API key, the model's name, the chat and the live view.

import { ApiError, call, setKey } from './api.js';
import { setLadder, setModel, startChat } from './chat.js';
import { startLive } from './live.js';

const $ = (id) => document.getElementById(id);

const THEMES = ['system', 'light', 'dark'];

function setTheme(theme) {
  if (theme === 'system') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $('theme-name').textContent = theme;
  localStorage.setItem('dsla-theme', theme);
}

function startTheme() {
  const saved = localStorage.getItem('dsla-theme');
  setTheme(THEMES.includes(saved) ? saved : 'system');
  $('theme').addEventListener('click', () => {
    const now = localStorage.getItem('dsla-theme');
    setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
  });
}

// On a narrow screen one of the two views is shown at a time.
function startViews() {
  for (const button of document.querySelectorAll('[data-show]')) {
    button.addEventListener('click', () => {
      document.body.dataset.view = button.dataset.show;
      for (const other of document.querySelectorAll('[data-show]')) {
        other.setAttribute('aria-pressed', String(other === button));
      }
    });
  }
}

function setStatus(state, text) {
  $('status').dataset.state = state;
  if ($('status-text').textContent !== text) $('status-text').textContent = text;
}

let live = null;
let dismissed = false;  // the dialog opens by itself once; afterwards the button does it

function askForKey() {
  $('key-button').hidden = false;
  if (dismissed || $('key-dialog').open) return;
  dismissed = true;
  $('key-dialog').showModal();
}

function startKey() {
  $('key-button').addEventListener('click', () => $('key-dialog').showModal());
  $('key-cancel').addEventListener('click', () => $('key-dialog').close());
  $('key-form').addEventListener('submit', () => {
    setKey($('key').value);
    $('key').value = '';
    dismissed = false;
    live.now();
    findModel();
  });
}

async function findModel() {
  try {
    const models = await (await call('v1/models')).json();
    setModel(models.data[0].id);
    $('model').textContent = models.data[0].id;
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return askForKey();
    setTimeout(findModel, 3000);
  }
}

startTheme();
startViews();
startKey();
startChat(askForKey);
live = startLive({ setStatus, setLadder, askForKey });
findModel();
