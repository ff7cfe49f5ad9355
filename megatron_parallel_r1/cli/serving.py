"""Commands that serve: serve, serve-rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Serving")(serve)
    app.command("serve-rollout", rich_help_panel="Serving")(serve_rollout)


def serve(
    checkpoint: Annotated[Path, typer.Option(help="A released folder, such as runs/tiny/release.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. Default: this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="PARALLEL_R1_API_KEY", help="Clients send it as a bearer token.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients. Default: the folder's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: the GPU, if any.")] = None,
    running: Annotated[int, typer.Option(min=1, help="Most requests decoded at once.")] = 32,
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most KV cache tokens they hold. Default: no limit.")
    ] = None,
    waiting: Annotated[int, typer.Option(min=1, help="Most requests in the queue.")] = 1024,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit of a request, queueing included.")] = 600,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a response. Default: as in training.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 4096,
    engine: Annotated[
        Literal["native", "sglang", "vllm"], typer.Option(help="In this process, or on rollout servers.")
    ] = "native",
    server: Annotated[
        list[str] | None, typer.Option(help="URL of a rollout server of the checkpoint; repeatable.")
    ] = None,
    servers: Annotated[int, typer.Option(min=0, help="Number of rollout servers to start instead.")] = 0,
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the rollout servers' API key.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with that key, instead.")] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds that requests have to end after SIGTERM.")
    ] = 20,
) -> None:
    """Serve a released checkpoint with OpenAI's API and a page that shows the paths side by side."""
    from megatron_parallel_r1.serve.admission import Limits
    from megatron_parallel_r1.serve.engines import EngineChoice
    from megatron_parallel_r1.serve.run import serve as run_server
    from megatron_parallel_r1.utils.hub import local_folder

    limits = Limits(
        running=running,
        cache_tokens=cache_tokens,
        waiting=waiting,
        seconds=seconds,
        max_tokens=max_tokens,
        prompt_tokens=prompt_tokens,
    )
    choice = EngineChoice(engine, tuple(server or ()), servers, key_variable, key_file)
    run_server(local_folder(checkpoint), host, port, api_key, name, device, limits, drain, choice)


def serve_rollout(
    checkpoint: Annotated[
        Path, typer.Option(help="A Hugging Face folder, or the Hub's name of a downloaded model.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTION]...", help="Options for the engine's own command line."),
    ] = None,
    engine: Annotated[Literal["sglang", "vllm"], typer.Option(help="Inference engine.")] = "sglang",
    servers: Annotated[int, typer.Option(min=1, help="Number of servers.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size of a server.")] = 1,
    dp: Annotated[
        int, typer.Option(min=1, help="Replicas in one server; above 1, weights travel by disk only.")
    ] = 1,
    nodes: Annotated[
        int, typer.Option(min=1, help="Machines that one server extends over; run this command on each.")
    ] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of these machines this is.")] = 0,
    rendezvous: Annotated[
        str | None, typer.Option(help="HOST:PORT of the first of these machines; a free port.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: reachable from other nodes.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the first server; 0: free ones.")
    ] = 30000,
    memory_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of a GPU's memory to use.")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Device. Default: the GPUs, if any.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of the weights. Default: float32 on a CPU, the checkpoint's on a GPU."
        ),
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of prompt and response.")
    ] = None,
    cache_tokens: Annotated[int, typer.Option(min=1, help="Size of the KV cache on a CPU.")] = 20000,
    deterministic: Annotated[
        bool, typer.Option(help="A sampled token depends on its seed and position only.")
    ] = True,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Join isolated paths exactly (SGLang plugin).")
    ] = False,
    colocated: Annotated[
        bool, typer.Option("--colocated", help="Servers can release their GPU memory.")
    ] = False,
    python: Annotated[
        Path | None, typer.Option(help="Python of the engine. Default: that of `make engines`.")
    ] = None,
    log_dir: Annotated[Path, typer.Option(help="Folder of the logs, one file per server.")] = Path(
        "runs/servers"
    ),
    urls_file: Annotated[
        Path | None, typer.Option(help="File to write the URLs to once all servers are healthy.")
    ] = None,
    crashes: Annotated[int, typer.Option(min=1, help="Consecutive crashes before giving up.")] = 3,
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the API key that servers ask for.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with that key, instead.")] = None,
    hang_seconds: Annotated[
        float, typer.Option(min=1, help="Restart a server that gives no answer for so long.")
    ] = 600,
) -> None:
    """Start rollout servers of a checkpoint, restart those that crash, and stop all on exit."""
    from megatron_parallel_r1.rollout.launcher.command import LaunchSettings
    from megatron_parallel_r1.rollout.launcher.run import serve_rollout as run_servers
    from megatron_parallel_r1.utils.hub import local_folder

    serving = LaunchSettings(
        checkpoint=local_folder(checkpoint),
        engine=engine,
        servers=servers,
        tensor=tp,
        data=dp,
        nodes=nodes,
        node_rank=node_rank,
        rendezvous=rendezvous,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        memory_share=memory_share,
        context_tokens=context_tokens,
        cache_tokens=cache_tokens,
        deterministic=deterministic,
        isolated=isolated,
        colocated=colocated,
        python=python,
        log_dir=log_dir,
        urls_file=urls_file,
        crashes=crashes,
        hang_seconds=hang_seconds,
        key_variable=key_variable,
        key_file=key_file,
        options=tuple(options or ()),
    )
    run_servers(serving, tell=typer.echo)
