'use strict';

const $ = (id) => document.getElementById(id);
const SHOWN = 200;  // Rows of the ranking on the page; all are scored.

let catalogue;       // What /v1/catalogue says.
let user;            // The chosen one: {key, context, events}.
let key;             // What the server knows it by.
let sent = 0;        // How many events the server's state has.
let before = null;   // {item: rank} of the ranking that is shown.
let token = '';
let work = Promise.resolve();  // One thing after another.

function say(text, bad = false) {
  $('status').textContent = text;
  $('status').className = bad ? 'bad' : '';
}

function enqueue(step) {
  work = work.then(step).catch((error) => say(error.message, true));
}

async function ask(path, body) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers['Content-Type'] = 'application/json';
  const method = body ? 'POST' : 'GET';
  const response = await fetch(
    path, {method, headers, body: body && JSON.stringify(body)});
  const answer = await response.json();
  if (response.ok) return answer;
  $('login').hidden = response.status !== 401;
  const error = new Error(
    [answer.detail, answer.fix].filter(Boolean).join('; '));
  error.status = response.status;
  throw error;
}

function numEvents() {
  const columns = Object.values(user.events);
  return columns.length ? columns[0].length : 0;
}

function eventsFrom(first) {
  return Object.fromEntries(
    Object.entries(user.events).map(([k, v]) => [k, v.slice(first)]));
}

// The moment after the user's last event.
function next() {
  const times = user.events[catalogue.time] || [];
  const last = times[times.length - 1];
  if (typeof last === 'string') {
    const moment = Date.parse(`${last.slice(0, 23)}Z`) + 1000 * catalogue.step;
    return new Date(moment).toISOString().slice(0, 23);
  }
  return (last || 0) + catalogue.step;
}

function request(candidates, first) {
  return {
    user: key,
    context: {...user.context, [catalogue.time]: next()},
    candidates,
    events: eventsFrom(first),
    first,
  };
}

async function score() {
  let reply;
  try {
    reply = await ask('v1/score', request(catalogue.items, sent));
  } catch (error) {
    if (error.status !== 409) throw error;
    reply = await ask('v1/score', request(catalogue.items, 0));  // All of them.
  }
  return reply.num_events === numEvents() ? reply : replace();
}

// Somebody clicked as this user before: another history, then the right one.
async function replace() {
  const events = user.events;
  if (numEvents() > 1) {
    user.events = eventsFrom(1);
    try {
      await ask('v1/score', request(catalogue.items, 0));
    } finally {
      user.events = events;
    }
    const reply = await ask('v1/score', request(catalogue.items, 0));
    if (reply.num_events === numEvents()) return reply;
  }
  throw new Error('The server knows more events of this user; choose another');
}

async function rank() {
  const begun = performance.now();
  const reply = await score();
  const took = performance.now() - begun;
  sent = reply.num_events;
  showCost(reply, took);
  const best = showRanking(reply);
  showHistory(await attention(best));
  say(`${catalogue.titles.length} items ranked.`);
}

async function attention(item) {
  if (!numEvents()) return null;
  const one = Object.fromEntries(
    Object.entries(catalogue.items).map(([k, v]) => [k, [v[item]]]));
  try {
    return await ask('v1/attention', request(one, 0));
  } catch (error) {
    return null;  // A model without such weights.
  }
}

function cell(text, kind = '') {
  const span = document.createElement('span');
  span.textContent = text;
  span.className = kind;
  return span;
}

function showCost(reply, took) {
  const t = reply.timings_ms;
  const ms = (x) => `${x.toFixed(1)} ms`;
  $('source').textContent = reply.source;
  $('events').textContent = reply.num_events;
  $('score').textContent = ms(t.score);
  $('queue').textContent = ms(t.queue);
  $('decode').textContent = ms(t.read + t.decode + t.rows);
  $('round').textContent = ms(took);
  const line = document.createElement('li');
  line.append(cell(`${reply.source}, ${reply.num_events} events`),
    cell(ms(t.score), 'number'));
  $('log').prepend(line);
  while ($('log').children.length > 12) $('log').lastChild.remove();
}

function showRanking(reply) {
  const tasks = Object.keys(reply.probabilities);
  if (!$('task').options.length) {
    $('task').append(...tasks.map((name) => new Option(name, name)));
  }
  const p = reply.probabilities[$('task').value];
  const order = reply.logits[$('task').value]
    .map((x, i) => [x, i]).sort((a, b) => b[0] - a[0] || a[1] - b[1])
    .map((pair) => pair[1]);
  const now = new Map(order.map((item, place) => [item, place]));
  $('size').textContent = order.length > SHOWN
    ? `the first ${SHOWN} of ${order.length}` : order.length;
  $('ranking').replaceChildren(...order.slice(0, SHOWN).map((item, place) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.dataset.item = item;
    const moved = before ? before.get(item) - place : 0;
    button.append(
      cell(place + 1, 'number soft'), cell(catalogue.titles[item]),
      cell(moved ? `${moved > 0 ? '▲' : '▼'} ${Math.abs(moved)}` : '',
        moved > 0 ? 'number up' : 'number down'),
      cell(`${(100 * p[item]).toFixed(1)} %`, 'number'));
    button.addEventListener('click', () => enqueue(() => act(item)));
    const row = document.createElement('li');
    row.append(button);
    return row;
  }));
  before = now;
  return order[0];
}

function showHistory(looks) {
  const number = numEvents();
  $('count').textContent = number;
  const places = new Map(catalogue.items[catalogue.key].map((x, i) => [x, i]));
  const rows = [];
  const most = Math.max(...(looks ? looks.weights : []), 1e-9);
  for (let i = number - 1; i >= 0; i--) {
    const row = document.createElement('li');
    const item = user.events[catalogue.key][i];
    const place = places.get(item);
    const did = Object.keys(catalogue.actions)
      .map((name) => `${name} ${user.events[name][i]}`).join(', ');
    const weight = looks && i >= looks.first ? looks.weights[i - looks.first] : 0;
    row.style.setProperty('--share', `${(100 * weight / most).toFixed(1)}%`);
    if (looks) row.title = `${(100 * weight).toFixed(1)} % of the attention`;
    row.append(
      cell(place === undefined ? `${catalogue.key} ${item}`
        : catalogue.titles[place]),
      cell(looks ? `${did} · ${(100 * weight).toFixed(1)} %` : did, 'soft'));
    rows.push(row);
  }
  $('history').replaceChildren(...rows);
}

async function act(item) {
  const event = {[catalogue.time]: next()};
  for (const [name, values] of Object.entries(catalogue.items)) {
    event[name] = values[item];
  }
  for (const [name, value] of Object.entries(catalogue.did)) {
    const choice = $(`did-${name}`);
    event[name] = choice ? Number(choice.value) : value;
  }
  if (catalogue.request) {
    event[catalogue.request] = 1 + Math.max(
      0, ...(user.events[catalogue.request] || []).slice(-1));
  }
  for (const [name, value] of Object.entries(event)) {
    (user.events[name] ||= []).push(value);
  }
  await rank();
}

async function choose() {
  user = structuredClone(catalogue.users[Number($('user').value)]);
  key = catalogue.is_key_read
    ? user.key : `${user.key} ${Math.random().toString(36).slice(2)}`;
  sent = 0;
  before = null;
  $('log').replaceChildren();
  await rank();
}

async function start() {
  catalogue = await ask('v1/catalogue');
  $('login').hidden = true;
  $('user').replaceChildren(...catalogue.users.map((each, i) => new Option(
    i ? `${each.key}, ${each.events[catalogue.time].length} events`
      : 'somebody new', i)));
  $('actions').replaceChildren(
    ...Object.entries(catalogue.actions).map(([name, choices]) => {
      const label = document.createElement('label');
      const select = document.createElement('select');
      select.id = `did-${name}`;
      select.append(...choices.map((x) => new Option(x, x)));
      select.value = catalogue.did[name];
      label.append(`${name} `, select, ' ');
      return label;
    }));
  await choose();
}

$('user').addEventListener('change', () => enqueue(choose));
$('reset').addEventListener('click', () => enqueue(choose));
$('task').addEventListener('change', () => enqueue(() => {
  before = null;
  return rank();
}));
$('login').addEventListener('submit', (event) => {
  event.preventDefault();
  token = $('token').value;
  enqueue(start);
});
enqueue(start);
