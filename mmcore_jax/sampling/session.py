"""A conversation in the terminal: each line that is no command is an instruction, answered by a picture.

What has been said and drawn is one interleaved document, as training has them: the user's images and text, the image
that was generated, the next text. The picture to come may look back at all of it.
"""

import contextlib
import dataclasses
import io
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image as PillowImage

from mmcore_jax.config import UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data.example import Image, Text
from mmcore_jax.sampling import pictures, requests
from mmcore_jax.sampling.requests import Job

HELP = """\
A line is a prompt; it may speak of the images before it. Commands:
  /image PATH  give an image, for the next prompt
  /undo        take back the last image given, or else the last turn
  /seed N      another seed, from the next turn on
  /save PATH   copy the last picture to PATH
  /help, /quit"""


@dataclasses.dataclass(frozen=True)
class Turn:
    """Images that the user gives, the prompt, what was drawn of it, and the file that holds that."""

    given: list[Image]
    prompt: str
    drawn: bytes
    path: pathlib.Path

    @property
    def segments(self) -> list[Text | Image]:
        return [*self.given, example_lib.text(self.prompt), example_lib.image(self.drawn, generate=True)]


class Session:
    """The state of a conversation. `paint` draws and saves the pictures of jobs, and yields them, uint8 `[H, W, 3]`.

    They go to `directory` as turn_01.png and so on, after those that are there.
    """

    def __init__(
        self,
        paint: Callable[[Sequence[Job]], Iterator[np.ndarray]],
        directory: pathlib.Path,
        seed: int,
        most_images: int,
    ) -> None:
        self._paint, self._directory = paint, directory
        self._seed, self._most_images = seed, most_images
        self._given: list[Image] = []
        self._turns: list[Turn] = []
        self._number = max(map(_turn_number, directory.iterdir()), default=0)
        self._commands = {
            "/image": self._add_image,
            "/undo": self._undo,
            "/seed": self._set_seed,
            "/save": self._copy,
            "/help": self._help,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Obeys line after line, up to /quit; a line with a mistake changes nothing but says so."""
        for line in map(str.strip, lines):
            if line == "/quit":
                break
            try:
                self._obey(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            return self._take_turn(line) if line else None
        command, _, argument = line.partition(" ")
        if command not in self._commands:
            raise UserError(f"there is no command {command}: type /help.")
        return self._commands[command](argument.strip())

    def _take_turn(self, prompt: str) -> None:
        path = self._directory / f"turn_{self._number + 1:02d}.png"
        job = Job(requests.to_come(prompt, self._remember(prompt)), self._seed, path)
        (image,) = self._paint([job])
        encoded = io.BytesIO()
        PillowImage.fromarray(image).save(encoded, "PNG")
        self._turns.append(Turn(self._given, prompt, encoded.getvalue(), path))
        self._given, self._number = [], self._number + 1
        _say(f"{path}: {prompt!r}, seed {self._seed}")

    def _remember(self, prompt: str) -> list[Text | Image]:
        """The conversation up to a prompt, without its first turns where it has more images than the model knows."""
        images = np.array([len(turn.given) + 1 for turn in self._turns], int)
        follow = images[::-1].cumsum()[::-1] + len(self._given) + 1  # images of the conversation from each turn on
        forgotten = int((follow > self._most_images).sum())
        if forgotten:
            _say(
                f"(the first turns are out of sight, {forgotten} of {len(self._turns)}: the run was trained with "
                f"{self._most_images} images at most)"
            )
        remembered = [segment for turn in self._turns[forgotten:] for segment in turn.segments]
        return [*remembered, *self._given, example_lib.text(prompt)]

    # --- Commands -----------------------------------------------------------------------------------------------------

    def _add_image(self, path: str) -> None:
        if not path:
            raise UserError("/image needs the path of an image.")
        if len(self._given) + 2 > self._most_images:
            raise UserError(f"the run was trained with {self._most_images} images at most, the one to draw among them.")
        self._given.append(requests.read_image(pathlib.Path(path).expanduser(), "the image"))
        _say(f"{path}: for the next prompt")

    def _undo(self, _: str) -> None:
        if self._given:
            self._given.pop()
            _say("the image given last is taken back")
        elif self._turns:
            turn = self._turns.pop()
            _say(f"the turn {turn.prompt!r} is taken back; {turn.path} stays")
        else:
            raise UserError("there is nothing to undo.")

    def _set_seed(self, seed: str) -> None:
        if not re.fullmatch("[0-9]+", seed):
            raise UserError(f"/seed needs a number, not {seed!r}.")
        requests.check_seed(int(seed), "the seed")
        self._seed = int(seed)
        _say(f"seed {self._seed}")

    def _copy(self, path: str) -> None:
        if not self._turns:
            raise UserError("there is no picture to save yet.")
        output = pathlib.Path(path).expanduser()
        pictures.check_output(output, "/save")
        try:
            shutil.copyfile(self._turns[-1].path, output)
        except (OSError, shutil.SameFileError) as error:
            raise UserError(f"cannot copy {self._turns[-1].path} to {output}: {error}.") from error
        _say(f"{output}: a copy of {self._turns[-1].path}")

    def _help(self, _: str) -> None:
        _say(HELP)


def read_lines() -> Iterator[str]:
    """The lines of standard input, asked for where it is a terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text is not worth the session
    asking = sys.stdin.isatty()
    if asking:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, edits and recalls the lines that `input` reads
    while True:
        try:
            yield input("> " if asking else "")
        except (EOFError, KeyboardInterrupt):
            return


def _turn_number(path: pathlib.Path) -> int:
    match = re.fullmatch(r"turn_([0-9]+)\.png", path.name)
    return int(match[1]) if match else 0


def _say(line: str) -> None:
    print(line, flush=True)
