"""Text drawn as strips of patches: the eyes of pixel language models.

Names are imported on first use. `python -m datamodules.rendering TEXT FILE.png` draws one line.
"""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "PygameRenderer": "pygame_backend",
        "Renderer": "base",
        "Strip": "base",
        "TextRenderer": "harfbuzz",
    },
)
