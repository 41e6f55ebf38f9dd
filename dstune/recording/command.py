"""The verb `record`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

from dstune.core.api_client import ApiClient
from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED
from dstune.core.text import one_line
from dstune.recording import options
from dstune.recording.answers import Asking, ask_all
from dstune.recording.folder import Folder
from dstune.recording.inventory import Inventory, record_inventory, take_inventory
from dstune.recording.masking import make_redactor
from dstune.recording.prompts import Prompt, read_prompts, recorded_prompts, without_repeats


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises DstuneError."""
    arguments = options.make_parser().parse_args(argv)
    options.check(arguments)
    if arguments.delete_user is not None:
        return delete_user(arguments)
    address = options.address_of(arguments)
    prompts = read_prompts(arguments.prompts, arguments.user_column)
    client = ApiClient(address)
    if arguments.dry_run:
        inventory = take_inventory(client)
        _print_inventory(inventory)
        _print_estimate(arguments, _models(arguments, inventory), without_repeats(prompts))
        if arguments.prompts_of:
            print("prompts of the jobs' files are counted once the files are recorded")
        _print_missing(inventory.missing)
        return EXIT_DONE
    folder = Folder(arguments.folder, make_redactor(arguments.redact), address.key)
    try:
        return record(arguments, client, folder, prompts)
    except KeyboardInterrupt:
        print("dstune: interrupted; the same command goes on", file=sys.stderr)
        return EXIT_PREEMPTED
    finally:
        folder.close()


def record(arguments: argparse.Namespace, client: ApiClient, folder: Folder, prompts: list[Prompt]) -> int:
    """Record the inventory, then the answers; return the exit code. Raises DstuneError."""
    names = ("temperature", "seed", "max_tokens", "logprobs")
    folder.hold_settings(server=client.address.url, redact=sorted(set(arguments.redact)))
    if prompts or arguments.prompts_of:
        folder.hold_settings(asking={name: getattr(arguments, name) for name in names})
    folder.save_manifest(complete=False)
    inventory = take_inventory(client)
    _print_inventory(inventory)
    record_inventory(client, folder, inventory, arguments.user_column)
    listed = {"shutdown_dates": inventory.shutdown_dates, "fine_tuned_models": inventory.fine_tuned}
    folder.save_manifest(**listed, missing=inventory.missing)
    identifiers = [name for part in dict.fromkeys(arguments.prompts_of) for name in inventory.files_of(part)]
    prompts = prompts + recorded_prompts(folder, identifiers, arguments.user_column, inventory.missing)
    unique, models = without_repeats(prompts), _models(arguments, inventory)
    _print_estimate(arguments, models, unique)
    asking = Asking(
        arguments.temperature,
        arguments.seed,
        arguments.max_tokens,
        arguments.logprobs,
        deployments=bool(arguments.azure) and arguments.azure != "v1",
    )
    sufficient = ask_all(
        client, folder, asking, models if unique else (), unique,
        at_once=arguments.at_once, budget_tokens=arguments.budget_tokens, missing=inventory.missing,
    )  # fmt: skip
    folder.save_manifest(missing=inventory.missing, complete=sufficient, finished_at=int(time.time()))
    _print_missing(inventory.missing)
    print(f"recorded in {one_line(str(folder.path))}: manifest.json lists its files and digests")
    if not sufficient:
        print(f"dstune: --budget-tokens {arguments.budget_tokens:,} is used up; a larger one goes on", file=sys.stderr)
        return EXIT_PREEMPTED
    return EXIT_DONE


def delete_user(arguments: argparse.Namespace) -> int:
    """Delete a user's rows and answers; return the exit code. Raises UserError."""
    folder = Folder(arguments.folder, create=False)
    try:
        count = folder.delete_user(arguments.delete_user, arguments.user_column)
        folder.save_manifest()
    finally:
        folder.close()
    if folder.manifest.get("redact"):
        print("files were masked as they were recorded: a user id that was masked in them is not recognized")
    print(f"{count:,} rows and answers of this user are deleted; later recordings into this folder leave the user out")
    return EXIT_DONE


def _models(arguments: argparse.Namespace, inventory: Inventory) -> list[str]:
    return [*dict.fromkeys(arguments.models)] or inventory.fine_tuned


def _print_inventory(inventory: Inventory) -> None:
    sizes = [entry.get("bytes") for entry in inventory.files.values()]
    known = sum(size for size in sizes if isinstance(size, int))
    unknown = sum(not isinstance(size, int) for size in sizes)
    note = f" and {unknown:,} of unknown size" if unknown else ""
    requests = 2 * len(inventory.jobs) + len(inventory.files)
    print(
        f"{len(inventory.jobs):,} jobs, {len(inventory.files):,} files ({known:,} bytes{note}), "
        f"{len(inventory.models):,} models; at least {requests:,} requests to record them"
    )
    for name, date in sorted(inventory.shutdown_dates.items(), key=lambda pair: pair[1]):
        print(f"  {one_line(name)} is switched off on {one_line(date)}")


def _print_estimate(arguments: argparse.Namespace, models: Sequence[str], prompts: Mapping[str, Prompt]) -> None:
    requests = len(models) * len(prompts)
    if not requests:
        reason = (
            "no prompts were named (--prompts, --prompts-of)"
            if not prompts
            else "there is no fine-tuned model: --models NAME"
        )
        print(f"no answers are recorded: {reason}")
        return
    tokens = len(models) * sum(prompt.tokens for prompt in prompts.values())
    most = requests * arguments.max_tokens
    print(
        f"{len(prompts):,} prompts to {len(models):,} models: {requests:,} requests, about {tokens:,} tokens of prompts "
        f"(4 characters each) and at most {most:,} of answers"
    )
    if arguments.input_price is not None:
        cost = (tokens * arguments.input_price + most * arguments.output_price) / 1e6
        print(f"  about {cost:,.2f} at most at the prices that you named")


def _print_missing(missing: Mapping[str, str]) -> None:
    for name, reason in missing.items():
        print(f"dstune: not recorded: {one_line(name)}: {one_line(reason)}", file=sys.stderr)
