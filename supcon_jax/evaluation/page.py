"""A page to look through the test images of a run: one HTML file, without a server or a network."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from supcon_jax.evaluation.confusion import NAMED, NUMBERED, confusion_matrix, row_shares

THUMBNAIL = 64  # pixels, at most
HARDEST = 30  # images in the gallery
NEIGHBOURS = 12  # shown for an image
LISTED = 20  # most classes with colours of their own, and a legend
BLOCK = 1024  # images at a time in the search for neighbours
TOOLTIP = """
<img src="@thumbnail" alt="" style="width: 96px; image-rendering: pixelated"><br>
label <b>@label</b><br>predicted <b>@predicted</b>, @probability{0.0%}
"""


@dataclass(frozen=True)
class Predicted:
    """Test images, and what a classifier makes of them.

    Attributes:
      labels: `[images]` class ids.
      probabilities: `[images, classes]`.
      class_names: label k is `class_names[k]`.
    """

    labels: Int[np.ndarray, " images"]
    probabilities: Float[np.ndarray, "images classes"]
    class_names: tuple[str, ...]

    @property
    def classes(self) -> Int[np.ndarray, " images"]:
        """The most probable ones."""
        return self.probabilities.argmax(-1)

    @property
    def accuracy(self) -> float:
        """Share of the images whose most probable class is their label."""
        return float((self.classes == self.labels).mean())

    def hardest(self, count: int) -> Int[np.ndarray, " count"]:
        """Places of the images whose label got the least probability, the least first."""
        of_label = self.probabilities[np.arange(len(self.labels)), self.labels]
        return np.argsort(of_label, kind="stable")[:count]


@dataclass(frozen=True)
class Shown:
    """The images on the map.

    Attributes:
      places: `[shown]` in the test split, ascending.
      points: `[shown, 2]` on the map.
      thumbnails: `[shown]` pictures, see `thumbnail`.
      features: `[shown, dim]`; neighbours are those with the largest cosine.
    """

    places: Int[np.ndarray, " shown"]
    points: Float[np.ndarray, "shown 2"]
    thumbnails: list[str]
    features: Float[np.ndarray, "shown dim"]


def thumbnail(image: UInt8[np.ndarray, "height width channels"]) -> str:
    """An image as a `data:` address, at most `THUMBNAIL` pixels wide; small ones without loss."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    small, file = max(picture.size) <= THUMBNAIL, io.BytesIO()
    kind, options = ("png", {}) if small else ("jpeg", {"quality": 85})
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def nearest(
    features: Float[np.ndarray, "images dim"], count: int
) -> tuple[Int[np.ndarray, "images count"], Float[np.ndarray, "images count"]]:
    """Places and cosines of the nearest other images of each image, nearest first.

    Args:
      features: `[images, dim]`.
      count: how many; all others where there are not so many.

    Returns:
      Places and cosines, `[images, count]` both.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    count = min(count, len(unit) - 1)
    places, cosines = [], []
    for start in range(0, len(unit), BLOCK):
        similar = unit[start : start + BLOCK] @ unit.T
        rows = np.arange(len(similar))
        similar[rows, start + rows] = -np.inf
        best = np.argsort(-similar, axis=1, kind="stable")[:, :count]
        places.append(best)
        cosines.append(np.take_along_axis(similar, best, axis=1))
    return np.concatenate(places), np.concatenate(cosines)


def page(
    title: str,
    facts: str,
    predicted: Predicted,
    shown: Shown,
    hardest: Sequence[str],
) -> str:
    """The page: a map, nearest neighbours on a click, the confusion matrix, the hardest images.

    Args:
      title: of the page.
      facts: what is shown, in a sentence or two.
      predicted: of all test images.
      shown: those on the map.
      hardest: thumbnails of `predicted.hardest(len(hardest))`.

    Returns:
      HTML that loads nothing from elsewhere.
    """
    from bokeh.embed import file_html
    from bokeh.resources import INLINE

    points = _points(predicted, shown)
    variables = {
        "facts": facts,
        "gallery": [
            {"thumbnail": picture, **_described(predicted, place)}
            for place, picture in zip(
                predicted.hardest(len(hardest)).tolist(), hardest, strict=True
            )
        ],
    }
    return file_html(
        [_map(points, predicted.class_names), _confusions(predicted, points)],
        INLINE,
        title,
        template=resources.files("supcon_jax.evaluation").joinpath("page.html").read_text(),
        template_variables=variables,
    )


def _described(predicted: Predicted, place: int) -> dict[str, Any]:
    label, taken_for = predicted.labels[place], predicted.classes[place]
    return {
        "place": place,
        "label": predicted.class_names[label],
        "predicted": predicted.class_names[taken_for],
        "right": bool(label == taken_for),
        "of_label": float(predicted.probabilities[place, label]),
        "probability": float(predicted.probabilities[place, taken_for]),
    }


def _points(predicted: Predicted, shown: Shown) -> Any:
    """The table behind the map, one row an image."""
    from bokeh.models import ColumnDataSource

    names, at = np.array(predicted.class_names), shown.places
    labels, classes = predicted.labels[at], predicted.classes[at]
    right = labels == classes
    places, cosines = nearest(shown.features, NEIGHBOURS)
    return ColumnDataSource(
        {
            "x": shown.points[:, 0],
            "y": shown.points[:, 1],
            "place": at,
            "label": names[labels].tolist(),
            "predicted": names[classes].tolist(),
            "probability": predicted.probabilities[at, classes].round(3),
            "marker": np.where(right, "circle", "x").tolist(),
            "size": np.where(right, 7, 11),
            "thumbnail": shown.thumbnails,
            "nearest": places.tolist(),
            "cosine": cosines.round(3).tolist(),
        },
        name="points",
    )


def _map(points: Any, class_names: Sequence[str]) -> Any:
    """The images at their places: a colour for each class, crosses for those taken for another."""
    from bokeh.models import CDSView, CustomJS, GroupFilter, HoverTool
    from bokeh.models.annotations import Legend, LegendItem
    from bokeh.palettes import Category10, Category20, Turbo256
    from bokeh.plotting import figure
    from bokeh.transform import factor_cmap

    names = list(class_names)
    listed = len(names) <= LISTED
    few = Category10[10] if len(names) <= 10 else Category20[20]
    spread = [Turbo256[round(k)] for k in np.linspace(0, 255, len(names))]
    colors = list(few[: len(names)]) if listed else spread
    plot = figure(
        name="map",
        title="Map of the test images",
        height=620,
        sizing_mode="stretch_width",
        tools="pan,wheel_zoom,box_zoom,tap,reset,save",
        active_scroll="wheel_zoom",
        toolbar_location="above",
    )
    plot.axis.visible = plot.grid.visible = False
    options: dict[str, Any] = dict(
        size="size", marker="marker", alpha=0.75, line_width=2, nonselection_alpha=0.3
    )
    if listed:  # a click on a name of the legend hides the class
        items = []
        for name, color in zip(names, colors, strict=True):
            view = CDSView(filter=GroupFilter(column_name="label", group=name))
            scatter: Any = plot.scatter("x", "y", source=points, view=view, color=color, **options)
            index = _first_right(points, name)
            items.append(LegendItem(label=name, renderers=[scatter], index=index))
        plot.add_layout(Legend(items=items, title="label", click_policy="hide"), "right")
    else:
        plot.scatter("x", "y", source=points, color=factor_cmap("label", colors, names), **options)
    plot.add_tools(HoverTool(tooltips=TOOLTIP, limit=1))
    show = CustomJS(args={"points": points}, code="show_neighbours(points)")
    points.selected.js_on_change("indices", show)
    return plot


def _first_right(points: Any, label: str) -> int | None:
    """The first image of a class that is taken for it, so that the legend shows no cross."""
    pairs = zip(points.data["label"], points.data["predicted"], strict=True)
    return next((k for k, pair in enumerate(pairs) if pair == (label, label)), None)


def _confusions(predicted: Predicted, points: Any) -> Any:
    """The cells of the confusion matrix that have images; a click shows those on the map."""
    from bokeh.models import ColumnDataSource, CustomJS, FactorRange, LinearColorMapper
    from bokeh.palettes import Blues256
    from bokeh.plotting import figure

    names = list(predicted.class_names)
    matrix = confusion_matrix(predicted.classes, predicted.labels, len(names))
    rows, columns = np.nonzero(matrix)
    shares = row_shares(matrix)[rows, columns]
    cells = ColumnDataSource(
        {
            "label": np.array(names)[rows].tolist(),
            "predicted": np.array(names)[columns].tolist(),
            "images": matrix[rows, columns],
            "share": shares,
            "text": [f"{share:.0%}" if share >= 0.005 else "<1%" for share in shares],
            "ink": ["white" if share > 0.5 else "black" for share in shares],
        },
        name="cells",
    )
    plot = figure(
        name="confusions",
        title=f"Labels and predictions: {predicted.accuracy:.1%} of {matrix.sum():,} images",
        x_range=FactorRange(factors=names),
        y_range=FactorRange(factors=names[::-1]),
        x_axis_label="predicted",
        y_axis_label="label",
        height=560,
        sizing_mode="stretch_width",
        tools="pan,wheel_zoom,tap,reset,save",
        toolbar_location="above",
        tooltips="@label taken for @predicted: @images images, @share{0.0%} of the label's",
    )
    plot.grid.visible = False
    plot.axis.visible = len(names) <= NAMED
    plot.xaxis.major_label_orientation = "vertical" if max(map(len, names)) > 2 else "horizontal"
    colors = LinearColorMapper(palette=Blues256[::-1], low=0, high=1)
    fill: Any = {"field": "share", "transform": colors}
    plot.rect("predicted", "label", 1, 1, source=cells, fill_color=fill, line_color="#dddddd")
    if len(names) <= NUMBERED:
        centred: dict[str, Any] = dict(
            text_align="center", text_baseline="middle", text_font_size="11px"
        )
        plot.text("predicted", "label", "text", source=cells, text_color="ink", **centred)
    show = CustomJS(args={"cells": cells, "points": points}, code="show_cell(cells, points)")
    cells.selected.js_on_change("indices", show)
    return plot
