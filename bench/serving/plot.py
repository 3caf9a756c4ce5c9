"""SVG plots, of runs (level over time, how TTFT is distributed) and of any lines. Readable on light and dark pages."""

from xml.sax.saxutils import escape

COLOURS = ("#c8741b", "#7a6bbf", "#0e8583", "#5b6470")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#6b6f76}.title{font-size:14px;font-weight:600}"
    ".grid{stroke:#8a8f98;stroke-opacity:.25}.axis{stroke:#8a8f98}.line{fill:none;stroke-width:2;stroke-linejoin:round}"
)
WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 44, 44
LEGEND = 124  # width of one entry


def nice_step(span, steps=6):
    """1, 2 or 5 times a power of ten, so that `span` takes about `steps` of them."""
    raw = max(span, 1e-9) / steps
    power = 1.0
    while power * 10 <= raw:
        power *= 10
    while power > raw:
        power /= 10
    return next(power * m for m in (1, 2, 5, 10) if power * m >= raw)


def ticks(low, high):
    step = nice_step(high - low)
    values = []
    at = low
    while at <= high + 1e-9:
        values.append(round(at, 6))
        at += step
    return values


class Plot:
    def __init__(self, title, x_label, y_label, x_max, y_max):
        self.x_max, self.y_max = max(x_max, 1e-9), max(y_max, 1e-9)
        self.names = []
        self.parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
        for value in ticks(0, self.x_max):
            self.parts.append(f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
        for value in ticks(0, self.y_max):
            kind = "axis" if value == 0 else "grid"
            y = self.y(value)
            self.parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        self.parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_label)}</text>')
        self.parts.append(f'<text x="{LEFT - 40}" y="{TOP - 8}">{escape(y_label)}</text>')

    def x(self, value):
        return LEFT + value / self.x_max * (WIDTH - LEFT - RIGHT)

    def y(self, value):
        return HEIGHT - BOTTOM - value / self.y_max * (HEIGHT - TOP - BOTTOM)

    def steps(self, name, points):
        """A line that keeps its value until the next point."""
        if not points:
            self.names.append(name)
            return
        path = f"M{self.x(points[0][0]):.1f} {self.y(points[0][1]):.1f}"
        for at, value in points[1:]:
            path += f"H{self.x(at):.1f}V{self.y(value):.1f}"
        self.parts.append(f'<path class="line" stroke="{COLOURS[len(self.names) % len(COLOURS)]}" d="{path}"/>')
        self.names.append(name)

    def line(self, name, points):
        """A line through measured points."""
        colour = COLOURS[len(self.names) % len(COLOURS)]
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<path class="line" stroke="{colour}" d="M{path}"/>')
        self.parts.extend(f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in points)
        self.names.append(name)

    def mark(self, at, text):
        self.parts.append(f'<line class="axis" stroke-dasharray="3 3" x1="{self.x(at):.1f}" x2="{self.x(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        self.parts.append(f'<text x="{self.x(at) + 4:.1f}" y="{TOP + 12}">{escape(text)}</text>')

    def svg(self):
        legend = []
        x = WIDTH - RIGHT - LEGEND * len(self.names)
        for index, name in enumerate(self.names):
            at = x + LEGEND * index
            legend.append(f'<rect x="{at}" y="9" width="14" height="10" rx="2" fill="{COLOURS[index % len(COLOURS)]}"/>')
            legend.append(f'<text x="{at + 20}" y="18">{escape(name)}</text>')
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        return "\n".join([head, f"<style>{STYLE}</style>", *self.parts, *legend, "</svg>"]) + "\n"


def level_plot(runs, layers):
    """runs: [(name, samples, seconds of the burst's end)]."""
    longest = max((samples[-1]["time"] for _, samples, _ in runs if samples), default=1.0)
    plot = Plot("Level at which new requests start", "seconds since the burst began", f"level of {layers}", longest, layers)
    for name, samples, end in runs:
        plot.steps(f"{name}, {end:.0f} s", [(s["time"], s["controller"]["target_level"]) for s in samples])
    return plot.svg()


def ttft_plot(runs):
    """runs: [(name, [ttft, None where there was no reply])]. The share of the burst's requests whose first token had come after so many seconds."""
    longest = max((v for _, values in runs for v in values if v is not None), default=1.0)
    plot = Plot("Time to first token in the burst", "seconds", "% of requests sent", longest * 1.02, 100)
    for name, values, sent in ((name, sorted(v for v in ttfts if v is not None), len(ttfts)) for name, ttfts in runs):
        points = [(0.0, 0.0)]
        points += [(value, 100 * (i + 1) / sent) for i, value in enumerate(values)]
        points.append((longest * 1.02, points[-1][1]))
        plot.steps(name, points)
    return plot.svg()
