// Starts the page: theme, views, the API key, the chat and the live view.

import { hasKey, setKey } from './api.js';
import { noteRaises, setLadder, startChat } from './chat.js';
import { $, write } from './dom.js';
import { startLive } from './live.js';

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
  write($('status-text'), text);
}

let live = null;
let dismissed = false;  // the dialog opens by itself once; afterwards the button does it

function askForKey() {
  $('key-button').hidden = false;
  $('key-refused').hidden = !hasKey();
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
  });
}

startTheme();
startViews();
startKey();
startChat(askForKey);
live = startLive({ setStatus, setLadder, noteRaises, askForKey });
