import copy

import pytest

from ..loading import load, load_tensors
from . import render_checks


def test_strips_of_the_released_renderer(pixel, pixel_tensors):
    render_checks.check_released(pixel("render"), pixel_tensors("render_images"))


def test_widths_of_the_default_renderer(pixel):
    render_checks.check_widths(pixel("render"))


def test_shaping_and_reading_order(pixel):
    render_checks.check_shaping(pixel("shaping"))


def numbers(value, path=()):
    """Paths of all numbers in a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, (*path, index))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


def altered(data, path):
    """A copy in which one number is one step, or 1 %, larger."""
    data = copy.deepcopy(data)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    value = holder[path[-1]]
    holder[path[-1]] = value + max(1, abs(value) // 100) if isinstance(value, int) else value * 1.01 + 0.01
    return data


@pytest.mark.parametrize("path", list(numbers(load("pixel", "shaping"))), ids=str)
def test_every_number_of_shaping_counts(path):
    with pytest.raises(AssertionError):
        render_checks.check_shaping(altered(load("pixel", "shaping"), path))


# FreeType rounds sizes, so that one dot per inch more draws the same.
COMPARED = [path for path in numbers(load("pixel", "render")) if path != ("dpi",)]


@pytest.mark.parametrize("path", COMPARED, ids=str)
def test_every_number_of_strips_counts(path):
    with pytest.raises(AssertionError):
        render_checks.check_released(altered(load("pixel", "render"), path), load_tensors("pixel", "render_images"))


@pytest.mark.parametrize("name", sorted(load_tensors("pixel", "render_images")))
def test_every_image_counts(name):
    images = load_tensors("pixel", "render_images")
    pixels = images[name]
    pixels[pixels < 255] += 1
    with pytest.raises(AssertionError):
        render_checks.check_released(load("pixel", "render"), images)
