"""The page in the browser, with NiceGUI: a form on the left, the gallery on the right."""

import base64
import html
import io
import secrets
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

import numpy as np
from etils import epath
from fastapi import FastAPI, HTTPException, Request, Response
from nicegui import app, ui
from nicegui.elements.mixins.value_element import ValueElement
from PIL import Image

from imagen_jax.diffusion.samplers import Sampler
from imagen_jax.errors import UserError
from imagen_jax.models.configs import StageConfig
from imagen_jax.sampling.overrides import SamplingOverrides
from imagen_jax.sampling.pictures import grid
from imagen_jax.sampling.prompts import check_prompt
from imagen_jax.serving.request import (
    MAX_PROMPT,
    MAX_SEED,
    Limits,
    PictureRequest,
    read_query,
    real_number,
    whole_number,
)
from imagen_jax.serving.studio import Job, JobState, Shown, Studio

TITLE = "imagen-jax"
GALLERY_PICTURES = 100  # newest ones that a page shows
_REFRESH_SECONDS = 0.25  # between two looks at the queue and the gallery
_AWAY_SECONDS = 10.0  # without a connection, after which a page is taken for closed
_TAB_SECONDS = 86400.0  # that a tab's form is kept for after it changed last
_ERROR_LENGTH = 500  # characters
_PREVIEW_SIDE = 128  # pixels, of one picture in a preview at most

# NiceGUI brings its own fonts and scripts: nothing is asked of the network.
_STYLE = """
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; flex: 1 1 20rem; }
.picture { display: flex; flex-direction: column; gap: .25rem; min-width: 0; }
.picture img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #8881; border-radius: .4rem; }
img.small { image-rendering: pixelated; }
.preview { width: 100%; max-height: 40vh; object-fit: contain; border-radius: .4rem; }
.prompt { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden; }
.form { width: 24rem; max-width: 100%; }
@media (min-width: 48rem) { .form { position: sticky; top: 1rem; max-height: calc(100vh - 2rem); overflow-y: auto; } }
"""


def _data_address(pictures: np.ndarray) -> str:
    """Pictures uint8 (n, side, side, 3) side by side as the address of an image."""
    step = max(1, pictures.shape[1] // _PREVIEW_SIDE)
    buffer = io.BytesIO()
    Image.fromarray(grid(list(pictures[:, ::step, ::step]))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _address(shown: Shown) -> str:
    return f"/pictures/{quote(shown.name)}"


class _StageFields:
    """A stage's row of the form; what is left empty is as the stage has it."""

    def __init__(self, stage: StageConfig, overrides: SamplingOverrides, limits: Limits):
        own, self._name = stage.sampling, stage.name
        most = limits.steps_of(stage)
        with ui.row().classes("w-full items-end gap-2 no-wrap"):
            self._steps = (
                ui.number(
                    f"{stage.name} steps",
                    value=overrides.steps,
                    placeholder=str(own.sampler.steps),
                    min=1,
                    max=most,
                )
                .props(f'stack-label hint="own: {own.sampler.steps}, at most {most}"')
                .classes("flex-1")
            )
            self._guidance = (
                ui.number(
                    f"{stage.name} guidance",
                    value=overrides.guidance_weight,
                    placeholder=f"{own.guidance_weight:g}",
                    step=0.25,
                )
                .props(f'stack-label hint="own: {own.guidance_weight:g}, 1 is off"')
                .classes("flex-1")
            )
            choices: dict[str, str] = {"": f"{own.sampler.kind} (own)"}
            choices |= {kind.value: kind.value for kind in Sampler if kind is not own.sampler.kind}
            chosen = "" if overrides.sampler in (None, own.sampler.kind) else overrides.sampler.value
            self._sampler = ui.select(choices, label=f"{stage.name} sampler", value=chosen)
            self._sampler.props('hint=" "').classes("flex-1")
        self.elements: tuple[ValueElement, ...] = (self._steps, self._guidance, self._sampler)

    def overrides(self) -> SamplingOverrides:
        """What the row says.

        Raises:
          UserError: for a number that is none, naming the field.
        """
        steps, guidance, sampler = self._steps.value, self._guidance.value, self._sampler.value
        if sampler and sampler not in list(Sampler):
            raise UserError(f"{self._name} sampler {sampler!r} is none of {', '.join(Sampler)}")
        return SamplingOverrides(
            steps=None if steps is None else whole_number(steps, f"{self._name} steps"),
            guidance_weight=None if guidance is None else real_number(guidance, f"{self._name} guidance"),
            sampler=Sampler(sampler) if sampler else None,
        )


class Page:
    """One open page."""

    def __init__(self, studio: Studio, query: bytes, address: str):
        """Builds the page.

        Args:
          studio: draws.
          query: of its link.
          address: of who opened it.
        """
        self._studio, self._client, self._query = studio, address, query
        self._job: Job | None = None
        self._memory: MutableMapping[str, Any] | None = None  # what the browser's tab keeps over a reload
        self._id = ui.context.client.id
        self._cards: dict[str, ui.html] = {}  # of the pictures shown, by name, the newest first
        self._preview_call: tuple[str, int] | None = None
        ui.add_css(_STYLE)
        request, error = self._linked(query)
        with ui.row().classes("w-full gap-6 items-start"):
            with ui.column().classes("form gap-3"):
                ui.label(f"{TITLE} · {epath.Path(studio.model.folder.name).name}").classes(
                    "text-lg font-medium"
                )
                self._build_prompt(request)
                self._build_status()
                self._build_settings(request)
            self._gallery = ui.element("div").classes("gallery").props('role=list aria-label="Gallery"')
        self._elements: list[ValueElement] = [self._prompt, self._negative, self._seed, self._count]
        self._elements += [element for fields in self._fields for element in fields.elements]
        self._say(error)
        self.refresh()
        # Whoever closes the page waits for nothing any more. Who loads it again is back before it counts as closed.
        ui.context.client.on_connect(self._remember)
        ui.context.client.on_delete(self._leave_job)
        ui.timer(_REFRESH_SECONDS, self.refresh)

    def _linked(self, query: bytes) -> tuple[PictureRequest | None, str]:
        """The request of the link, and what is wrong with it."""
        if not query:
            return None, ""
        stages = self._studio.model.stages
        try:
            request = PictureRequest.from_query(read_query(query), len(stages))
            request.sampling(stages)
            self._studio.limits.check(request, stages)
            return request, ""
        except UserError as error:
            return None, str(error)

    def _build_prompt(self, request: PictureRequest | None) -> None:
        self._prompt = (
            ui.textarea("Prompt", value=request.prompt if request else "")
            .props(f'autogrow outlined autofocus maxlength={MAX_PROMPT} hint="Ctrl+Enter draws"')
            .classes("w-full")
        )
        for key in ("ctrl", "meta"):
            self._prompt.on(f"keydown.{key}.enter", self._submit)

    def _build_settings(self, request: PictureRequest | None) -> None:
        stages, limits = self._studio.model.stages, self._studio.limits
        overrides = (SamplingOverrides(),) * len(stages) if request is None else request.overrides
        self._negative = (
            ui.input("Negative prompt", value=(request.negative_prompt or "") if request else "")
            .props(f'maxlength={MAX_PROMPT} hint="what guidance leads away from"')
            .classes("w-full")
        )
        with ui.row().classes("w-full items-center gap-2 no-wrap"):
            seed = ui.number("Seed", value=request.seed if request else 0, min=0, max=MAX_SEED)
            self._seed = seed.props('hint="of the first picture"').classes("flex-1")
            ui.button("Random", icon="casino", on_click=self._random_seed).props("flat no-caps")
            number = request.num_images if request else 1
            count = ui.number("Pictures", value=number, min=1, max=limits.pictures)
            self._count = count.props(f'hint="1 to {limits.pictures}"').classes("w-20")
        self._fields = [
            _StageFields(stage, each, limits) for stage, each in zip(stages, overrides, strict=True)
        ]

    def _build_status(self) -> None:
        with ui.row().classes("w-full gap-2 no-wrap"):
            self._draw = ui.button("Draw", icon="brush", on_click=self._submit).classes("flex-1")
            self._stop = ui.button("Stop", icon="stop", on_click=self._stop_job).props("outline")
        self._error = ui.label().classes("w-full text-negative whitespace-pre-wrap").props("role=alert")
        self._warning = ui.label().classes("w-full text-warning whitespace-pre-wrap").props("role=status")
        self._bar = ui.linear_progress(value=0.0, show_value=False).props(
            'instant-feedback aria-label="Progress"'
        )
        self._status = ui.label().classes("text-sm opacity-80").props("role=status")
        self._preview = ui.element("img").classes("preview small").props('alt="The pictures as they form"')

    def _say(self, error: str) -> None:
        text = " ".join(error.split())  # it may quote a stranger's link
        self._error.text = text if len(text) <= _ERROR_LENGTH else f"{text[: _ERROR_LENGTH - 1]}…"
        self._error.visible = bool(error)

    def _random_seed(self) -> None:
        self._seed.value = secrets.randbelow(2**31)

    def _request(self) -> PictureRequest:
        """What the form says, or a program in its place."""
        prompt, negative = self._prompt.value or "", self._negative.value or None
        check_prompt(prompt)
        check_prompt(negative or "", "negative prompt")
        return PictureRequest(
            prompt=prompt,
            negative_prompt=negative,
            seed=whole_number(self._seed.value, "Seed"),
            num_images=whole_number(self._count.value, "Pictures"),
            overrides=tuple(fields.overrides() for fields in self._fields),
        )

    def _submit(self) -> None:
        if self._job is not None and not self._job.state.over:  # one at a time a page
            return
        try:
            self._wait_for(self._studio.submit(self._request(), self._client))
            self._say("")
        except UserError as error:
            self._job = None  # what it said last is of no use any more
            self._say(str(error))
        self.refresh()

    def _stop_job(self) -> None:
        if self._job is not None:
            self._job.stop()
        self.refresh()

    def _leave_job(self) -> None:
        if self._job is not None:
            self._job.leave(self)

    def _wait_for(self, job: Job) -> None:
        self._job = job
        job.join(self)

    async def _remember(self) -> None:
        """After the page has loaded: the form and the request as this tab of the browser had them before."""
        if self._memory is not None:  # the connection was lost for a moment
            self._memory["page"] = self._id
            return
        way = await ui.run_javascript("performance.getEntriesByType('navigation')[0].type")
        memory: MutableMapping[str, Any] = app.storage.tab
        memory["page"] = self._id  # the page before lives on for some seconds, and must not write any more
        job = self._studio.job(memory.get("job") or 0)
        # A link that is followed says what the form has, even if the tab has been there before.
        if again := way in ("reload", "back_forward") and memory.get("query") == self._query:
            for element, value in zip(self._elements, memory.get("form", [])):
                element.value = value
        if job is not None and (again or not job.state.over):
            self._wait_for(job)
        memory["query"] = self._query
        self._memory = memory
        self.refresh()

    def _keep(self) -> None:
        """Keeps what `_remember` brings back."""
        if self._memory is None or self._memory.get("page") != self._id:
            return
        values = [element.value for element in self._elements]
        # The browser's limit on lengths does not hold for a program in its place.
        form = [value[:MAX_PROMPT] if isinstance(value, str) else value for value in values]
        for name, value in {"form": form, "job": self._job and self._job.number}.items():
            if self._memory.get(name) != value:
                self._memory[name] = value

    def refresh(self) -> None:
        """Brings the page up to date."""
        self._keep()
        job = self._job
        busy = job is not None and not job.state.over
        self._draw.set_enabled(not busy)
        for element in (self._stop, self._bar):
            element.visible = busy
        self._warning.text = "" if job is None else "\n".join(job.warnings)
        self._warning.visible = bool(self._warning.text)
        self._status.text = "" if job is None else status_line(job, self._studio.before(job))
        if job is not None:
            self._bar.value = job.fraction
            if job.state is JobState.FAILED:
                self._say(job.message)
        self._show_preview(job if busy else None)
        self._show_gallery()

    def _show_preview(self, job: Job | None) -> None:
        preview = None if job is None else job.preview
        self._preview.visible = preview is not None
        call = None if preview is None else (preview.stage, preview.call)
        if preview is not None and call != self._preview_call:
            self._preview.props["src"] = _data_address(preview.pixels)
            self._preview.update()
        self._preview_call = call

    def _show_gallery(self) -> None:
        pictures = self._studio.gallery()[:GALLERY_PICTURES]
        names = [shown.name for shown in pictures]
        if names == list(self._cards):
            return
        # Only what is new is made and sent: every page that is open shows every picture.
        for name in self._cards.keys() - set(names):
            self._cards.pop(name).delete()
        order, cards = list(self._cards), {}
        with self._gallery:
            for place, shown in enumerate(pictures):
                name = shown.name
                cards[name] = self._cards.get(name) or _card(shown, self._studio.model.stages[-1].resolution)
                if order[place : place + 1] != [name]:
                    cards[name].move(self._gallery, place)
                    order = [*order[:place], name, *(other for other in order[place:] if other != name)]
        self._cards = cards


def status_line(job: Job, before: int) -> str:
    """How far a request has come, in words.

    Args:
      job: the request.
      before: how many come before it.
    """
    seconds = f"{job.seconds:.0f} s"
    match job.state:
        case JobState.WAITING:
            return f"waiting: {before} request{'s' * (before != 1)} before this one"
        case JobState.RUNNING:
            preview = job.preview
            if preview is None:
                return f"preparing · {seconds} (the first pictures with new settings wait for the compiler)"
            if preview.call == preview.calls and job.fraction < 1.0:
                return f"{preview.stage} is done, preparing what follows · {seconds}"
            return f"{preview.stage}: step {preview.call} of {preview.calls} · {seconds}"
        case JobState.DONE:
            return f"{len(job.names)} picture{'s' * (len(job.names) != 1)} in {seconds}"
        case JobState.STOPPED:
            return f"stopped after {seconds}"
        case JobState.FAILED:
            return f"failed after {seconds}"


def _card(shown: Shown, side: int) -> ui.html:
    """A picture of the gallery, as one element: a page has hundreds, and each of NiceGUI's takes kilobytes."""
    address, record = html.escape(_address(shown)), shown.record
    text = record.prompt + (f" · not {record.negative_prompt}" if record.negative_prompt else "")
    alt, text = html.escape(record.prompt[:MAX_PROMPT]), html.escape(text[: 2 * MAX_PROMPT])
    sampling = [each.sampling for each in record.stages]
    steps = ", ".join(str(each.sampler.steps) for each in sampling)
    weights = ", ".join(f"{each.guidance_weight:g}" for each in sampling)
    link = 'class="nicegui-link" href'
    again = ""
    if shown.again is not None:
        again = f'<a {link}="/?{html.escape(shown.again.query())}">Make it again</a>'
    return (
        ui.html(
            f'<a href="{address}" target="_blank"><img src="{address}" alt="{alt}" loading="lazy"'
            f' class="{"small" if side <= 256 else ""}"></a><div class="prompt text-sm" title="{text}">{text}</div>'
            f'<div class="text-xs opacity-70">seed {record.seed} · steps {steps} · guidance {weights}</div>'
            f'<div class="row gap-3 text-sm"><a {link}="{address}?download=1" download="{html.escape(shown.name)}">'
            f'Download</a>{again}<a {link}="{address}/record" target="_blank">JSON</a></div>',
            sanitize=False,  # every word of a stranger's is escaped above
        )
        .classes("picture")
        .props("role=listitem")
    )


def make_app(studio: Studio) -> FastAPI:
    """The page as an ASGI application.

    `/` is the page; `/pictures/NAME` a picture of the gallery, `/pictures/NAME/record` what made it, as JSON.
    One application a process: NiceGUI's pages are global.
    """
    api = FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None)

    def found(name: str) -> Shown:
        shown = studio.find(name)
        if shown is None:
            raise HTTPException(404, f"there is no picture {name}")
        return shown

    @api.get("/pictures/{name}")
    def picture(name: str, download: bool = False) -> Response:
        shown = found(name)
        try:
            content = (studio.folder / shown.name).read_bytes()
        except OSError as error:
            raise HTTPException(404, f"the picture {name} is not there any more") from error
        # A name always stands for the same picture.
        headers = {"Cache-Control": "private, max-age=86400"}
        if download:
            headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(shown.name)}"
        return Response(content, media_type="image/png", headers=headers)

    @api.get("/pictures/{name}/record")
    def record(name: str) -> dict:
        return found(name).record.to_metadata()

    @ui.page("/", title=TITLE)
    def page(request: Request) -> None:
        Page(studio, request.scope["query_string"], request.client.host if request.client else "")

    app.storage.max_tab_storage_age = _TAB_SECONDS
    ui.run_with(api, title=TITLE, dark=None, show_welcome_message=False, reconnect_timeout=_AWAY_SECONDS)
    return api
