"""Whether the device still adds two hundred ones."""

from __future__ import annotations

import argparse

import torch

ONES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    total = torch.ones(ONES, device=device).sum().item()
    if total != ONES:
        raise SystemExit(f"{ONES} ones are {total}")
    print("well")


if __name__ == "__main__":
    main()
