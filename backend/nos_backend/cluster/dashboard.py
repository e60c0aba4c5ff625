"""The page `/nos` of the Dask dashboard: who serves what, how fast, and why there are so many replicas.

It shows and explains; it changes nothing, because Dask's dashboard asks nobody for a password. Each of its
parts is an `/individual-nos-...` plot as well, which JupyterLab's Dask sidebar lists.
"""

from __future__ import annotations

import html
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from bokeh.layouts import column, row
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    FactorRange,
    HoverTool,
    NumeralTickFormatter,
)
from bokeh.models.widgets import Div
from bokeh.palettes import Category10
from bokeh.plotting import figure
from distributed.dashboard import scheduler as dask_pages
from distributed.dashboard.components.scheduler import BOKEH_THEME, env

from nos_backend.cluster.figures import Figures, stacked
from nos_backend.cluster.plane import TOPIC, ServePlane

if TYPE_CHECKING:
    from collections.abc import Callable

    from bokeh.document import Document
    from bokeh.models.layouts import LayoutDOM
    from distributed import Scheduler

#: Workers send their counts twice a second.
_REFRESH_MS: Final = 500
_MAX_EVENTS: Final = 50
#: What a device holds besides weights.
_OTHER: Final = "(contexts, activations)"
#: Events that say why there are as many replicas and workers as there are.
_SHOWN_EVENTS: Final = frozenset(
    {"scaled", "replicas", "draining", "failed", "executor-lost", "worker-joined", "worker-lost"}
    | {"worker-retiring", "worker-retired"}
)
#: Of ticks in bytes.
_MANTISSAS: Final = [2**power for power in range(10)]
_COLORS: Final = Category10[10]
_PARTS: Final = ("replicas", "waits", "answers", "latencies", "batches", "memory", "events")


class Page:
    """What one browser sees. Belongs to the scheduler's loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._figures = Figures()
        #: By model version, in order of appearance.
        self._colors: dict[str, str] = {}
        self.note = Div(name="nos-note", sizing_mode="stretch_width")
        self._replicas = Div(sizing_mode="stretch_width")
        self._events = Div(sizing_mode="stretch_width")
        self._lines = _source("lines", "model", "color", "times", "answers", "waits", "latencies")
        self._batches = _source("batches", "size", "model", "color", "start", "end", "count")
        self._memory = _source("memory", "worker", "model", "color", "start", "end", "bytes")
        self._room = _source("room", "worker", "capacity")
        self._sizes, self._workers = FactorRange(), FactorRange()
        self.parts: dict[str, LayoutDOM] = {
            "replicas": self._replicas,
            "waits": self._line("Waiting for the device, mean", "waits", "ms"),
            "answers": self._line("Answers", "answers", "1/s"),
            "latencies": self._line("Latency on the worker, p99", "latencies", "ms"),
            "batches": self._bars_of_batches(),
            "memory": self._bars_of_memory(),
            "events": self._events,
        }

    def update(self) -> None:
        """Show how it stands now."""
        plane = self._scheduler.plugins.get(ServePlane.name)
        state = plane.snapshot() if isinstance(plane, ServePlane) else {"workers": [], "models": {}}
        now_s = time.time()
        self._figures.observe(state["workers"], now_s)
        self.note.text = _said(state)
        self._replicas.text = _table("replicas", _REPLICA_COLUMNS, self._replica_rows(state, now_s))
        _show(self._lines, self._line_rows())
        self._show_batches()
        self._show_memory(state)
        self._events.text = _table("events", _EVENT_COLUMNS, self._event_rows())

    def _color(self, key: str) -> str:
        if key == _OTHER:
            return "#bbbbbb"
        return self._colors.setdefault(key, _COLORS[len(self._colors) % len(_COLORS)])

    def _replica_rows(self, state: dict[str, Any], now_s: float) -> list[tuple[Any, ...]]:
        rows = []
        for worker in state["workers"]:
            for model in worker["status"].get("models", ()):
                placed = state["models"].get(model["key"])
                if placed is None:
                    continue
                point = self._figures.now(model["key"], now_s, worker["name"])
                batches = (model.get("statistics") or {}).get("batches", {})
                num_batches = sum(batches.values())
                num_run = sum(size * count for size, count in batches.items())
                rows.append(
                    (
                        model["key"],
                        worker["name"],
                        worker["device"],
                        placed["replicas"].get(worker["name"], model["state"]),
                        model["num_pending"],
                        model["num_answered"],
                        f"{point.answers_hz:.1f}",
                        f"{1e3 * point.queue_s:.1f}",
                        f"{1e3 * point.p99_s:.1f}",
                        f"{num_run / max(1, num_batches):.1f}",
                        f"{model['device_bytes'] / 2**20:.1f}",
                    )
                )
        return sorted(rows)

    def _line_rows(self) -> list[tuple[Any, ...]]:
        return [
            (
                key,
                self._color(key),
                [1e3 * point.time_s for point in line],
                [point.answers_hz for point in line],
                [1e3 * point.queue_s for point in line],
                [1e3 * point.p99_s for point in line],
            )
            for key, line in sorted(self._figures.points.items())
        ]

    def _show_batches(self) -> None:
        found = self._figures.batches()
        sizes = sorted({size for counts in found.values() for size in counts})
        _set_factors(self._sizes, [str(size) for size in sizes])
        parts = [
            (str(size), key, float(counts[size]))
            for size in sizes
            for key, counts in sorted(found.items())
            if counts[size]
        ]
        bars = stacked(parts)
        _show(
            self._batches,
            [(*bar[:2], self._color(bar[1]), *bar[2:], bar[3] - bar[2]) for bar in bars],
        )

    def _show_memory(self, state: dict[str, Any]) -> None:
        workers = state["workers"]
        _set_factors(self._workers, [worker["name"] for worker in workers])
        parts = []
        for worker in workers:
            models = worker["status"].get("models", ())
            held = [(model["key"], model["device_bytes"]) for model in models]
            other = worker["status"].get("used_bytes", 0) - sum(size for _, size in held)
            parts += [
                (worker["name"], key, size)
                for key, size in [*sorted(held), (_OTHER, other)]
                if size > 0
            ]
        _show(
            self._memory,
            [
                (place, key, self._color(key), start, end, end - start)
                for place, key, start, end in stacked(parts)
            ],
        )
        rooms = [(it["name"], it["status"].get("capacity_bytes") or 0) for it in workers]
        _show(self._room, [room for room in rooms if room[1]])

    def _event_rows(self) -> list[tuple[Any, ...]]:
        found = [
            (at_s, told)
            for at_s, told in self._scheduler.get_events(TOPIC)
            if isinstance(told, dict) and told.get("kind") in _SHOWN_EVENTS
        ]
        return [
            (
                time.strftime("%H:%M:%S", time.localtime(at_s)),
                told["kind"],
                told.get("model", ""),
                told.get("name", ""),
                told.get("message", ""),
            )
            for at_s, told in reversed(found[-_MAX_EVENTS:])
        ]

    # Drawing.

    def _line(self, title: str, name: str, unit: str) -> Any:
        plot = _plot(title, x_axis_type="datetime", y_axis_label=unit)
        plot.y_range.start = 0
        plot.yaxis[0].formatter = NumeralTickFormatter(format="0.[000]")
        lines = plot.multi_line(
            xs="times",
            ys=name,
            color="color",
            line_width=2,
            legend_field="model",
            source=self._lines,
        )
        plot.add_tools(HoverTool(renderers=[lines], tooltips="@model", line_policy="nearest"))
        _tidy_legend(plot)
        return plot

    def _bars_of_batches(self) -> Any:
        plot = _plot("Batches of the last minute by size", x_range=self._sizes)
        plot.vbar(
            x="size",
            bottom="start",
            top="end",
            width=0.8,
            color="color",
            legend_field="model",
            source=self._batches,
        )
        plot.y_range.start = 0
        plot.add_tools(HoverTool(tooltips="@model: @count batches of @size"))
        _tidy_legend(plot)
        return plot

    def _bars_of_memory(self) -> Any:
        plot = _plot("Device memory by model", y_range=self._workers)
        plot.x_range.start = 0
        plot.hbar(
            y="worker", left=0, right="capacity", height=0.7, color="#eeeeee", source=self._room
        )
        parts = plot.hbar(
            y="worker",
            left="start",
            right="end",
            height=0.6,
            color="color",
            legend_field="model",
            source=self._memory,
        )
        plot.xaxis[0].ticker = BasicTicker(base=1024, mantissas=_MANTISSAS)
        plot.xaxis[0].formatter = NumeralTickFormatter(format="0.[0] b")
        plot.add_tools(HoverTool(renderers=[parts], tooltips="@model: @bytes{0.0 b}"))
        _tidy_legend(plot)
        return plot


_REPLICA_COLUMNS: Final = (
    *("Model", "Worker", "Device", "State", "Pending", "Answered"),
    *("Answers/s", "Queue ms", "p99 ms", "Mean batch", "Device MiB"),
)
_EVENT_COLUMNS: Final = ("Time", "Event", "Model", "Worker", "Why")
_STYLE: Final = """<style>
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; border-bottom: 1px solid #ccc; }
th, td { padding: 3px 10px; }
tr:nth-child(even) td { background: #f2f2f2; }
td { font-variant-numeric: tabular-nums; }
</style>"""


def _source(name: str, *columns: str) -> ColumnDataSource:
    return ColumnDataSource({column: [] for column in columns}, name=f"nos-{name}")


def _show(source: ColumnDataSource, rows: list[tuple[Any, ...]]) -> None:
    """Put rows into a source; one that has them already sends nothing to the browser."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(source.data)
    data = {name: list(values) for name, values in zip(source.data, columns, strict=True)}
    if data != source.data:
        source.data = data


def _set_factors(factors: FactorRange, names: list[str]) -> None:
    if list(factors.factors) != names:
        factors.factors = names


def _plot(title: str, **options: Any) -> Any:
    plot = figure(
        title=title,
        height=230,
        tools="",
        toolbar_location=None,
        sizing_mode="stretch_width",
        **options,
    )
    plot.min_border_right = 12
    return plot


def _tidy_legend(plot: Any) -> None:
    legend = plot.legend[0]
    plot.add_layout(legend, "above")
    legend.orientation = "horizontal"
    legend.ncols = 3
    legend.background_fill_alpha = 0
    legend.border_line_alpha = 0
    legend.label_text_font_size = "8pt"
    legend.padding = legend.margin = 4


def _table(name: str, titles: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Return a table as HTML; a table of Bokeh's shows new values only when the number of rows changes."""
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"{_STYLE}<table class='nos-{name}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _said(state: dict[str, Any]) -> str:
    workers, models = state["workers"], state["models"]
    if not workers:
        return "<b>No worker is here.</b> Models are placed as soon as one joins."
    serving = sum(
        phase == "serving" for model in models.values() for phase in model["replicas"].values()
    )
    wanted = sum(model["target"] for model in models.values())
    return (
        f"Workers: <b>{len(workers)}</b>. Replicas that serve: <b>{serving}</b> of {wanted} wanted."
        " This page only shows: scale with <code>nos scale</code> and <code>nos cluster</code>, or"
        " <code>%nos cluster</code> in"
        " a notebook."
    )


def _serving_doc(scheduler: Scheduler, extra: dict[str, Any], doc: Document) -> None:
    page = _open(scheduler, doc, "NOS: Serving")
    parts = page.parts
    for root in (
        page.note,
        parts["replicas"],
        row(parts["answers"], parts["latencies"], parts["waits"], sizing_mode="stretch_width"),
        row(parts["batches"], parts["memory"], sizing_mode="stretch_width"),
        parts["events"],
    ):
        doc.add_root(column(root, sizing_mode="stretch_width"))
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)


def _part_doc(name: str, scheduler: Scheduler, extra: dict[str, Any], doc: Document) -> None:
    page = _open(scheduler, doc, f"NOS: {name}")
    part = page.parts[name]
    part.sizing_mode = "stretch_both"
    doc.add_root(part)


def _open(scheduler: Scheduler, doc: Document, title: str) -> Page:
    page = Page(scheduler)
    page.update()
    doc.title = title
    doc.theme = BOKEH_THEME
    doc.add_periodic_callback(page.update, _REFRESH_MS)
    return page


def install() -> None:
    """Add the pages to those of every scheduler that is made in this process from now on."""
    pages: dict[str, Callable[..., None]] = dask_pages.applications
    pages["/nos"] = _serving_doc
    for name in _PARTS:
        pages[f"/individual-nos-{name}"] = partial(_part_doc, name)


def link(scheduler: Scheduler) -> None:
    """Add the page to the links at the top of all of a scheduler's pages."""
    names = dask_pages.template_variables(scheduler)["pages"]
    if "nos" not in names:
        names.insert(1, "nos")


def open_pages(scheduler: Scheduler) -> None:
    """Give a scheduler that was started without a dashboard Dask's pages and ours."""
    install()
    dask_pages.connect(scheduler.http_application, scheduler.http_server, scheduler)
    link(scheduler)
