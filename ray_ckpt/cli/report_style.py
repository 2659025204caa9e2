"""How a report looks. Colours of lanes and states are the same in pictures, tables and badges."""

STYLE = """
:root {
  --ink: #1d2530; --muted: #687483; --line: #e4e8ed; --paper: #fff; --ground: #f7f8fa;
  --save: #3f74b5; --verify: #2f9479; --export: #7b62b3; --copy: #b9822a; --purge: #8792a0;
  --bad: #c23f2c;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; font-weight: 650; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; font-weight: 650; margin: 0 0 14px; }
h3 { font-size: 15px; font-weight: 600; margin: 0 0 8px; }
p { margin: 0 0 4px; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 0 0 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; }
.muted, footer { color: var(--muted); }
footer { margin-top: 28px; font-size: 13px; }
section {
  background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 22px; margin-top: 18px;
}
.tiles { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; margin-top: 24px; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; }
.tile b { display: block; font-size: 20px; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 13px; }
.tile.bad b { color: var(--bad); }
.card { border-left: 3px solid var(--bad); padding: 2px 0 2px 16px; margin-top: 18px; }
.card:first-of-type { margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 500; color: var(--muted); white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 16em; }
.note { margin-top: 12px; font-size: 13.5px; }
.badge { font-size: 12px; font-weight: 550; white-space: nowrap; color: var(--muted);
  background: var(--ground); border-radius: 9px; padding: 1px 9px; }
.verified, .succeeded { color: var(--verify); background: #e6f4ef; }
.committed, .running { color: var(--save); background: #e7eff9; }
.saving, .pending, .retry_wait { color: #8a5f14; background: #faf1df; }
.dead, .quarantined, .missing, .abandoned, .blocked { color: var(--bad); background: #fbe9e6; }
.charts { display: grid; grid-template-columns: repeat(2, 1fr); gap: 20px 28px; }
figure { margin: 0; }
figcaption { font-size: 13.5px; color: var(--muted); margin-bottom: 4px; }
.key { white-space: nowrap; margin-left: 14px; padding-left: 14px; position: relative; }
.key::before { content: ""; position: absolute; left: 0; top: 50%; width: 10px;
  border-top: 2px solid var(--save); }
.key.c1::before { border-color: var(--copy); }
svg { display: block; width: 100%; height: auto; }
.scroll svg { min-width: 760px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--muted); }
.grid { stroke: var(--line); }
.lane { stroke: #cfd6de; }
.faultline { stroke: var(--bad); stroke-opacity: 0.18; }
.mark { fill-opacity: 0.82; }
.saves { fill: var(--save); } .verifies { fill: var(--verify); } .exports { fill: var(--export); }
.copies { fill: var(--copy); } .purges { fill: var(--purge); } .faults { fill: var(--bad); }
.curve polyline { fill: none; stroke: var(--save); stroke-width: 1.8; stroke-linejoin: round; }
.curve circle { fill: var(--save); }
.curve.c1 polyline { stroke: var(--copy); } .curve.c1 circle { fill: var(--copy); }
summary { cursor: pointer; color: var(--muted); font-size: 13.5px; margin-top: 10px; }
details[open] summary { margin-bottom: 12px; }
@media (max-width: 860px) {
  .tiles { grid-template-columns: repeat(2, 1fr); } .charts { grid-template-columns: 1fr; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
