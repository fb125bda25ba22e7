// SPDX-License-Identifier: Apache-2.0
// Draws the charts of the page from the JSON in it. All text is set as text, never as HTML.
'use strict';

const WIDTH = 400, HEIGHT = 230, LEFT = 62, RIGHT = 12, TOP = 8, BOTTOM = 36;  // of a chart, in its own units
const COLOURS = 6, DASHES = ['', '6 3', '2 2'], FEW = 40;                       // curves of so few points show them
const runs = JSON.parse(document.getElementById('data').textContent);
const NAMESPACE = (document.querySelector('svg') || {}).namespaceURI;
const settings = {scale: 'auto', smoothing: 0.5, hidden: new Set()};

// ---- small parts

const short = value => {
  const size = Math.abs(value);
  if (value && (size >= 1e6 || size < 1e-3)) return value.toExponential(2).replace(/\.?0+e/, 'e').replace('e+', 'e');
  return String(Number(value.toPrecision(4)));
};

function make(parent, name, attributes, text) {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

// An exponential moving average over points, corrected for its start at zero.
function smooth(values, factor) {
  let sum = 0, weight = 0;
  return values.map(value => {
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
}

// ---- axes: {low, high, place: value -> 0 to 1, ticks}

function linearAxis(low, high, count) {
  if (low === high) [low, high] = low ? [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1] : [0, 1];
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(k => k * unit >= rough) * unit, ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(Number((k * step).toPrecision(12)));
  return {low, high, ticks, place: value => (value - low) / (high - low)};
}

function logAxis(low, high) {
  if (low === high) [low, high] = [low / 1.2, high * 1.2];
  const [first, last] = [Math.log10(low), Math.log10(high)], ticks = [];
  const marks = last - first < 0.8 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8] : last - first < 2 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil((last - first) / 6));
  for (let decade = Math.floor(first); decade <= last; decade++) {
    if (marks.length === 1 && decade % every) continue;
    for (const mark of marks) {
      const value = Number(`${mark}e${decade}`);
      if (value >= low * 0.999 && value <= high * 1.001) ticks.push(value);
    }
  }
  return {low, high, ticks, place: value => (Math.log10(value) - first) / (last - first)};
}

// ---- one chart

// What a chart shows: [{run, name, x, y, drawn: smoothed y}], without the runs that are hidden.
function curvesOf(figure) {
  const {curve, level} = figure.dataset, factor = 'smooth' in figure.dataset ? settings.smoothing : 0;
  return runs.map((run, index) => {
    const [x, y] = (level ? run.levels[level] : run.curves[curve]) || [[], []];
    return {run: index, name: run.name, x, y, drawn: factor ? smooth(y, factor) : y, smoothed: factor > 0};
  }).filter(found => found.x.length && !settings.hidden.has(found.run));
}

function isLog(values) {
  if (settings.scale !== 'auto') return settings.scale === 'log' && values.some(value => value > 0);
  return Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
}

function draw(figure) {
  const svg = figure.querySelector('svg'), curves = curvesOf(figure);
  clearPoint(figure);
  svg.replaceChildren();
  figure.plot = null;
  if (!curves.length) {
    make(svg, 'text', {x: WIDTH / 2, y: HEIGHT / 2, 'text-anchor': 'middle'}, 'no values');
    return;
  }
  const all = curves.flatMap(curve => curve.y), log = isLog(all), values = log ? all.filter(value => value > 0) : all;
  const low = Math.min(...values), high = Math.max(...values), margin = log || low === high ? 0 : (high - low) * 0.04;
  const vertical = log ? logAxis(low / 1.05, high * 1.05) : linearAxis(low - margin, high + margin, 6);
  const places = curves.flatMap(curve => curve.x), isLevel = 'level' in figure.dataset;
  const [from, to] = [Math.min(...places), Math.max(...places)];
  const horizontal = isLevel ? logAxis(from / 1.1, to * 1.1) : linearAxis(from === to ? from : Math.min(0, from), to, 5);
  const across = value => LEFT + horizontal.place(value) * (WIDTH - LEFT - RIGHT);
  const up = value => HEIGHT - BOTTOM - vertical.place(value) * (HEIGHT - TOP - BOTTOM);
  drawAxes(svg, horizontal, vertical, across, up, isLevel ? 'sigma' : 'kimg', figure.dataset.unit);
  const usable = value => !log || value > 0;
  for (const curve of curves) {
    if (curve.smoothed) drawCurve(svg, curve, curve.y, across, up, usable, 'curve raw');
    drawCurve(svg, curve, curve.drawn, across, up, usable, 'curve');
    if (!curve.smoothed && curve.x.length < FEW) {
      curve.x.forEach((x, k) => usable(curve.y[k]) &&
        make(svg, 'circle', {cx: across(x), cy: up(curve.y[k]), r: 2.6, class: `dot c${curve.run % COLOURS}`}));
    }
  }
  figure.plot = {curves, across, up, usable, isLevel};
}

function drawAxes(svg, horizontal, vertical, across, up, name, unit) {
  const [right, bottom] = [WIDTH - RIGHT, HEIGHT - BOTTOM];
  for (const value of vertical.ticks) {
    make(svg, 'line', {x1: LEFT, x2: right, y1: up(value), y2: up(value), class: 'grid'});
    make(svg, 'text', {x: LEFT - 6, y: up(value) + 4, 'text-anchor': 'end'}, short(value));
  }
  for (const value of horizontal.ticks) {
    make(svg, 'line', {x1: across(value), x2: across(value), y1: TOP, y2: bottom, class: 'grid'});
    make(svg, 'text', {x: across(value), y: bottom + 15, 'text-anchor': 'middle'}, short(value));
  }
  make(svg, 'line', {x1: LEFT, x2: right, y1: bottom, y2: bottom, class: 'frame'});
  make(svg, 'line', {x1: LEFT, x2: LEFT, y1: TOP, y2: bottom, class: 'frame'});
  make(svg, 'text', {x: right, y: HEIGHT - 5, 'text-anchor': 'end'}, name);
  make(svg, 'text', {x: -(TOP + bottom) / 2, y: 11, 'text-anchor': 'middle', transform: 'rotate(-90)'}, unit);
}

function drawCurve(svg, curve, values, across, up, usable, kind) {
  let path = '', pen = 'M';
  values.forEach((value, k) => {
    if (usable(value)) path += `${pen}${across(curve.x[k]).toFixed(1)} ${up(value).toFixed(1)}`;
    pen = usable(value) ? 'L' : 'M';
  });
  const dashes = DASHES[Math.floor(curve.run / COLOURS) % DASHES.length];
  make(svg, 'path', {d: path, class: `${kind} c${curve.run % COLOURS}`, ...(dashes && {'stroke-dasharray': dashes})});
}

// ---- values under the pointer

function nearest(sorted, value) {
  let best = 0;
  sorted.forEach((found, k) => { if (Math.abs(found - value) < Math.abs(sorted[best] - value)) best = k; });
  return best;
}

function point(figure, event) {
  clearPoint(figure);
  if (!figure.plot) return;
  const {curves, across, up, usable, isLevel} = figure.plot, svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const wanted = (event.clientX - box.left) / box.width * WIDTH;
  const found = curves.map(curve => ({curve, k: nearest(curve.x.map(across), wanted)}));
  const closest = found.reduce((a, b) => Math.abs(across(a.curve.x[a.k]) - wanted) <= Math.abs(across(b.curve.x[b.k]) - wanted) ? a : b);
  const at = closest.curve.x[closest.k], group = make(svg, 'g', {class: 'pointed'});
  make(group, 'line', {x1: across(at), x2: across(at), y1: TOP, y2: HEIGHT - BOTTOM, class: 'frame'});
  const tip = document.createElement('div');
  tip.className = 'tip';
  tip.append(isLevel ? `sigma ${short(at)}` : `${short(at)} kimg`);
  for (const {curve, k} of found) {
    if (usable(curve.drawn[k]))
      make(group, 'circle', {cx: across(curve.x[k]), cy: up(curve.drawn[k]), r: 4, class: `dot c${curve.run % COLOURS}`});
    const row = tip.appendChild(document.createElement('div'));
    row.appendChild(document.createElement('span')).className = `swatch c${curve.run % COLOURS} d${Math.floor(curve.run / COLOURS) % 3}`;
    row.appendChild(document.createElement('span')).textContent = curve.name;
    row.appendChild(document.createElement('b')).textContent = short(curve.drawn[k]);
  }
  figure.appendChild(tip);
  const place = across(at) / WIDTH * box.width;
  tip.style.top = '30px';
  tip.style.left = `${Math.max(0, place > box.width / 2 ? place - tip.offsetWidth - 12 : place + 12)}px`;
}

function clearPoint(figure) {
  figure.querySelectorAll('.tip, .pointed').forEach(element => element.remove());
}

// ---- the page

function drawAll() {
  document.querySelectorAll('.chart').forEach(draw);
}

function enlarge(button) {
  const dialog = document.querySelector('dialog'), title = document.createElement('p');
  dialog.querySelectorAll('img, p').forEach(element => element.remove());
  title.textContent = button.querySelector('img').alt;
  dialog.prepend(title, button.querySelector('img').cloneNode());
  dialog.showModal();
}

document.documentElement.classList.add('scripted');
document.querySelectorAll('input[name=scale]').forEach(input => input.addEventListener('change', () => {
  settings.scale = input.value;
  drawAll();
}));
document.querySelectorAll('input[data-run]').forEach(input => {
  input.checked = true;
  input.addEventListener('change', () => {
    settings.hidden[input.checked ? 'delete' : 'add'](Number(input.dataset.run));
    drawAll();
  });
});
document.getElementById('smoothing').addEventListener('input', event => {
  settings.smoothing = Number(event.target.value);
  document.querySelector('output').textContent = settings.smoothing.toFixed(2);
  drawAll();
});
document.querySelectorAll('.chart').forEach(figure => {
  figure.addEventListener('pointermove', event => point(figure, event));
  figure.addEventListener('pointerdown', event => point(figure, event));
  figure.addEventListener('pointerleave', () => clearPoint(figure));
});
document.querySelectorAll('.strip button:enabled').forEach(button => button.addEventListener('click', () => enlarge(button)));
drawAll();
