"""A network as an HTTP service: POST /classify takes an image and returns the best five classes as JSON.

python examples/deploy/service/service.py digits.dsconv --port 8000 --workers 2
curl --data-binary @digit.png http://127.0.0.1:8000/classify

It needs dsconv-runtime, pillow, starlette and uvicorn. Concurrent requests are batched, at most --batch of them; the
first one waits for others at most --wait milliseconds. If --queue requests are in progress, further ones get status 503
at once. After SIGTERM it answers all accepted requests and exits.
"""

import argparse
import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import dsconv_runtime

BEST = 5
MOST_BYTES, MOST_PIXELS = 20_000_000, 50_000_000
SECONDS_TO_STOP = 30


class Waiting(NamedTuple):
    x: np.ndarray
    since: float
    answer: Future[np.ndarray]


class Batches:
    """Threads that run a network on batches of single inputs with the same shape."""

    def __init__(self, network: dsconv_runtime.Network, workers: int, most: int, wait_s: float):
        self._network, self._most, self._wait_s = network, most, wait_s
        self._waiting: list[Waiting] = []
        self._changed = threading.Condition()
        self._closed = False
        self.runs = self.samples = 0
        self._threads = [threading.Thread(target=self._work, name=f"worker {i}") for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, x: np.ndarray) -> Future[np.ndarray]:
        """Return the future output for ``x``, a sample without the batch dimension."""
        waiting = Waiting(x, time.monotonic(), Future())
        with self._changed:
            self._waiting.append(waiting)
            self._changed.notify_all()
        return waiting.answer

    def close(self) -> None:
        """Process the waiting inputs, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while batch := self._take():
            batch = [one for one in batch if one.answer.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                outputs = self._network(np.stack([one.x for one in batch]))
            except Exception as error:
                for one in batch:
                    one.answer.set_exception(error)
            else:
                for one, output in zip(batch, outputs, strict=True):
                    one.answer.set_result(output)

    def _take(self) -> list[Waiting]:
        """Return the oldest inputs of one shape, as soon as there are enough or the first has waited long enough."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                batch = [one for one in self._waiting if one.x.shape == first.x.shape][: self._most]
                left = first.since + self._wait_s - time.monotonic()
                if len(batch) == self._most or left <= 0 or self._closed:
                    taken = set(map(id, batch))
                    self._waiting = [one for one in self._waiting if id(one) not in taken]
                    self.runs += 1
                    self.samples += len(batch)
                    return batch
                self._changed.wait(left)


class Service:
    """The application: its answers to requests."""

    def __init__(self, options: argparse.Namespace):
        self.network = dsconv_runtime.Network(options.network)
        if self.network.preprocess is None or len(self.network.inputs) != 1 or len(self.network.outputs) != 1:
            raise SystemExit(f"{options.network}: expected a classifier of images that says how these are prepared")
        dsconv_runtime.set_threads(options.threads)
        self.options = options
        self.accepted = self.answered = self.refused = 0

    def app(self) -> Starlette:
        routes = [Route("/classify", self.classify, methods=["POST"]), Route("/health", self.health)]
        return Starlette(routes=routes, lifespan=self.lifespan)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        options = self.options
        self.batches = Batches(self.network, options.workers, options.batch, options.wait / 1000)
        try:
            yield
        finally:
            await run_in_threadpool(self.batches.close)
            self.network.close()

    async def health(self, _: Request) -> JSONResponse:
        """Return figures to monitor: it is overloaded if refusals grow, or if runs have nearly --batch samples each."""
        return JSONResponse(
            {
                "status": "ok",
                "version": dsconv_runtime.__version__,
                "isa": dsconv_runtime.isa(),
                "in_work": self.accepted - self.answered,
                "answered": self.answered,
                "refused": self.refused,
                "runs": self.batches.runs,
                "samples": self.batches.samples,
            }
        )

    async def classify(self, request: Request) -> JSONResponse:
        if self.accepted - self.answered >= self.options.queue:
            self.refused += 1
            raise HTTPException(503, "too many requests are in work: try again later", {"Retry-After": "1"})
        self.accepted += 1
        try:
            x = await run_in_threadpool(self.prepared, await body_of(request))
            return JSONResponse({"best": self.best(await asyncio.wrap_future(self.batches.submit(x)))})
        except dsconv_runtime.DataError as error:
            raise HTTPException(400, str(error)) from error
        finally:
            self.answered += 1

    def prepared(self, body: bytes) -> np.ndarray:
        assert self.network.preprocess is not None
        try:
            image = Image.open(io.BytesIO(body))
            if image.width * image.height > MOST_PIXELS:
                raise HTTPException(413, f"expected at most {MOST_PIXELS} pixels, got {image.width} x {image.height}")
            mode = "L" if self.network.preprocess["channels"] == "gray" else "RGB"
            pixels = np.asarray(ImageOps.exif_transpose(image).convert(mode))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise HTTPException(400, f"expected an image, got {len(body)} bytes of no format that is known") from error
        return dsconv_runtime.prepare(pixels, self.network.preprocess)

    def best(self, logits: np.ndarray) -> list[dict[str, Any]]:
        names = self.network.classes
        order = np.argsort(-logits, kind="stable")[:BEST].tolist()
        return [{"class": i, "name": names[i] if names else None, "logit": float(logits[i])} for i in order]


async def body_of(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"expected at most {MOST_BYTES} bytes")
    return bytes(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free, which is printed (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="runs of the network at once (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that one of these runs has (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="most images of one run (%(default)s)")
    parser.add_argument("--wait", type=float, default=2, help="milliseconds, at most, for others (%(default)s)")
    parser.add_argument("--queue", type=int, default=64, help="most requests in work (%(default)s)")
    options = parser.parse_args()
    for name in ("workers", "threads", "batch", "queue"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected a number from 1, got {getattr(options, name)}")
    uvicorn.run(
        Service(options).app(),
        host=options.host,
        port=options.port,
        timeout_graceful_shutdown=SECONDS_TO_STOP,
        access_log=False,
    )


if __name__ == "__main__":
    main()
