"""Send images to service.py from many concurrent clients, and compare each answer with that of the network itself.

python examples/deploy/service/load_test.py digits.dsconv http://127.0.0.1:8000 --requests 1000 --clients 16

It ends with an error if an answer is wrong, or if a request is neither answered nor refused.
"""

import argparse
import http.client
import io
import json
import statistics
import threading
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

import dsconv_runtime

SIDE = 40


def image(seed: int, mode: str) -> Image.Image:
    """Return a smooth picture of random colours."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, bands), np.uint8)
    return Image.fromarray(noise[..., 0] if bands == 1 else noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=1000, help="to be answered; refused ones are sent again")
    parser.add_argument("--clients", type=int, default=16, help="that send at once (%(default)s)")
    parser.add_argument("--images", type=int, default=32, help="different ones (%(default)s)")
    options = parser.parse_args()

    network = dsconv_runtime.Network(options.network)
    mode = "L" if network.preprocess["channels"] == "gray" else "RGB"
    pictures = [image(seed, mode) for seed in range(options.images)]
    bodies = [encoded(picture) for picture in pictures]
    expected = [network(dsconv_runtime.prepare(np.asarray(p), network.preprocess)[None])[0] for p in pictures]

    address = urlsplit(options.url)
    turn = count()
    seen: Counter[str] = Counter()
    times: list[float] = []
    faults: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        while (request := next(turn)) < options.requests and not faults:
            which = request % len(bodies)
            while True:
                start = time.perf_counter()
                try:
                    connection.request("POST", "/classify", bodies[which])
                    response = connection.getresponse()
                    answer = response.read()
                except (OSError, http.client.HTTPException) as error:
                    faults.append(f"request {request} is lost: {type(error).__name__}: {error}")
                    return
                seen[str(response.status)] += 1
                if response.status != 503:
                    break
                time.sleep(0.01)
            times.append(time.perf_counter() - start)
            if response.status != 200 or wrong(json.loads(answer), expected[which]):
                faults.append(f"request {request} has a wrong answer: {response.status} {answer!r}")
        connection.close()

    start = time.perf_counter()
    clients = [threading.Thread(target=client) for _ in range(options.clients)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.perf_counter() - start
    if faults:
        raise SystemExit("\n".join(faults))
    slowest = statistics.quantiles(times, n=100)[98] if len(times) > 1 else times[0]
    print(
        f"{seen['200']} answers, all right; {seen['503']} refused and sent again; {len(times) / seconds:.0f} a second, "
        f"median {1e3 * statistics.median(times):.1f} ms, 99th percentile {1e3 * slowest:.1f} ms"
    )


def wrong(answer: Any, logits: np.ndarray) -> bool:
    best = answer["best"]
    return [logits[one["class"]].item() for one in best] != [one["logit"] for one in best] or any(
        best[i]["logit"] != value for i, value in enumerate(sorted(logits.tolist(), reverse=True)[: len(best)])
    )


if __name__ == "__main__":
    main()
