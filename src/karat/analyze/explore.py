"""The explorer: a page in the browser where one image goes through a run's model, block by block, head by head."""

from __future__ import annotations

import io
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from karat.analyze import figures
from karat.analyze.analysis import FOLDER
from karat.analyze.attention import (
    BlockAttention,
    attention_of,
    check_head,
    choose_block,
    class_maps,
    grid_of,
    region,
    rollout,
    rollout_maps,
)
from karat.analyze.functions import arguments_of, drawn_curves, instead_of_edges, operator_of_block
from karat.analyze.loading import Run, Samples, open_run
from karat.analyze.quality import measures
from karat.operator.operator import KArAtOperator

PICTURES = {
    "maps": "What the class token looks at (outlined: the fewest patches with half of the mass)",
    "matrices": "Scores and attention",
    "functions": "Edge functions, and how often the scores of this image occur",
}


@dataclass(frozen=True)
class HeadView:
    """What is seen of one image in one head of one block."""

    maps: Figure | None  # none where attention is cut into windows
    matrices: Figure
    functions: Figure | None  # none where the head keeps softmax
    numbers: dict[str, tuple[float, float]]  # measure -> (of σ, of softmax)
    note: str


class Explorer:
    """A run's model and what it does to an image; without the browser, so that it can be scripted."""

    def __init__(self, run: Run, weights: str = "last") -> None:
        self.run, self.model = run, run.model(weights)
        self._recorded = lru_cache(maxsize=4)(self._record)
        self.example = run.samples(1)
        found = attention_of(self.model, self.example.images)
        self.blocks = [block.name for block in found]
        self.heads = [block.sigma.shape[1] for block in found]

    def view(self, path: Path, block: int, head: int, *, signed: bool = False) -> HeadView:
        """Scores, σ, maps, edge functions and measures for an image file.

        Raises ValueError for a file that is no whole image, or a block or head that isn't there.
        """
        samples, blocks = self._recorded(path, _stamp(path))
        chosen = choose_block(blocks, block)
        check_head(head, chosen.sigma.shape[1])
        scores, sigma = chosen.scores[:1, head : head + 1], chosen.sigma[:1, head : head + 1]
        op = operator_of_block(self.model, block)
        op = op if op is not None and head in op.karat_heads else None  # the head's
        softmax = chosen.softmax[:1, head : head + 1]
        shown = {"σ(A)": sigma[0, 0]} | ({} if op is None else {"softmax(A)": softmax[0, 0]})
        own, fixed = measures(sigma), measures(softmax)
        names = [name for name in own if name != "head_diversity"]
        drawn, note = self._maps(samples, blocks, sigma, None if op is None else softmax, signed)
        functions = None
        if op is not None and op.config.has_edges:
            functions = self._functions(op, block, head, chosen)
        else:
            blind = ", blind to the scores" if op is not None and op.config.is_static else ""
            note += f" This head {instead_of_edges(self.model, block, op)}{blind}: it has no edge functions."
        return HeadView(
            maps=drawn,
            matrices=figures.draw_matrices(scores[0, 0], shown),
            functions=functions,
            numbers={name: (float(own[name][0]), float(fixed[name][0])) for name in names},
            note=note.strip(),
        )

    def _record(self, path: Path, stamp: tuple[int, int]) -> tuple[Samples, list[BlockAttention]]:
        samples = self.run.image(path)
        return samples, attention_of(self.model, samples.images)

    def _maps(
        self, samples: Samples, blocks: list[BlockAttention], sigma: Tensor, softmax: Tensor | None, signed: bool
    ) -> tuple[Figure | None, str]:
        try:
            grid = grid_of(self.model)
            found = {"σ": class_maps(sigma, grid, signed=signed)[:, 0]}
        except ValueError as error:
            return None, str(error)
        if softmax is not None:
            found["softmax"] = class_maps(softmax, grid)[:, 0]
        found["rollout, all blocks"] = rollout_maps(rollout([block.sigma for block in blocks]), grid)
        regions = {name: region(maps) for name, maps in found.items()}
        return figures.draw_regions(samples.pixels, found, regions, scale=1.2, maps_too=True), ""

    def _functions(self, op: KArAtOperator, block: int, head: int, seen: BlockAttention) -> Figure:
        title = f"block {block}, head {head}"
        arguments = arguments_of(op, seen)[:1, op.karat_heads.index(head)]
        found, near = drawn_curves(op, head, arguments)
        shown = {title: found}, {title: near}, {title: arguments}
        return figures.draw_functions(*shown, argument=op.order.argument, scale=1.4)


def _stamp(path: Path) -> tuple[int, int]:
    """What tells a file from what stood there before; zeros where there is none, which reading it will say."""
    if not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def build_app(explorer: Explorer) -> Any:
    """The page, a gradio Blocks. Raises ValueError where gradio isn't installed."""
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("the explorer needs gradio; install it with: pip install 'karat[explore]'") from None

    def picture(name: str, title: str) -> Any:
        gr.Markdown(f"**{title}**")
        buttons = ["download", "fullscreen"]
        return gr.Image(show_label=False, interactive=False, format="png", buttons=buttons, elem_id=name)

    def heads_of(block: int) -> Any:
        return gr.Radio(choices=list(range(explorer.heads[block])), value=0)

    def look(path: str | None, block: int, head: int | None, signed: bool) -> tuple[Any, ...]:
        if path is None:
            return None, None, None, "Drop an image, or take one of the run's own."
        try:
            view = explorer.view(Path(path), block, head or 0, signed=signed)
        except ValueError as error:
            raise gr.Error(str(error).replace(path, Path(path).name), print_exception=False) from None
        return _pixels(view.maps), _pixels(view.matrices), _pixels(view.functions), _numbers(view)

    example = explorer.run.folder / FOLDER / "example.png"
    example.parent.mkdir(exist_ok=True)
    Image.fromarray((explorer.example.pixels[0] * 255).round().byte().numpy()).save(example)
    with gr.Blocks(title=f"karat: {explorer.run.label}", analytics_enabled=False) as app:
        settings = explorer.run.settings
        gr.Markdown(f"## {explorer.run.label}\n{settings.model} on {settings.data}, {explorer.run.folder.name}")
        with gr.Row():
            with gr.Column(scale=1):
                image = gr.Image(
                    type="filepath", height=240, label="image", sources=["upload", "clipboard"], elem_id="image"
                )
                # the file behind what the browser sent: gradio's own would open a broken one, and say so less clearly
                image.preprocess = lambda payload: None if payload is None else payload.path
                own = gr.Button("an image of the run's data", elem_id="own")
                names = [(f"{i}: {name}", i) for i, name in enumerate(explorer.blocks)]
                block = gr.Dropdown(choices=names, value=len(names) - 1, label="block", elem_id="block")
                head = gr.Radio(choices=list(range(explorer.heads[-1])), value=0, label="head", elem_id="head")
                signed = gr.Checkbox(value=False, label="keep negative values in maps", elem_id="signed")
                numbers = gr.Markdown(elem_id="numbers")
            with gr.Column(scale=3):
                maps, matrices, functions = (picture(name, title) for name, title in PICTURES.items())
        inputs, outputs = [image, block, head, signed], [maps, matrices, functions, numbers]
        own.click(lambda: str(example), outputs=image)
        block.change(heads_of, block, head)
        for control in (image, block, head, signed):
            control.change(look, inputs, outputs)
        app.load(look, inputs, outputs)
    return app


def serve(run: Path, *, weights: str = "last", host: str = "127.0.0.1", port: int = 7860, browser: bool = True) -> None:
    """Serve the explorer of a run until it is interrupted. Nothing is asked of the network.

    Raises ValueError where gradio isn't installed or the folder isn't a run, OSError for a port in use.
    """
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise ValueError(f"--host {host}: no such address ({error.strerror})") from None
    app = build_app(Explorer(open_run(run), weights))
    import gradio as gr

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # gradio's own come from the network
    print(f"explorer: http://{host}:{port} (Ctrl-C ends it)")
    app.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        quiet=True,
        theme=gr.themes.Base(**fonts),
        footer_links=[],
        allowed_paths=[str(run / FOLDER)],
    )


def _pixels(figure: Figure | None) -> Image.Image | None:
    return None if figure is None else Image.open(io.BytesIO(figures.encode(figure, "png", dpi=110)))


def _numbers(view: HeadView) -> str:
    rows = [f"| {name.replace('_', ' ')} | {own:.3f} | {fixed:.3f} |" for name, (own, fixed) in view.numbers.items()]
    table = "\n".join(["| measure | σ(A) | softmax(A) |", "|---|---|---|", *rows])
    return f"{table}\n\n{view.note}" if view.note else table
