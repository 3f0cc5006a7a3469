"""`safemax app`: a local web page to erase, compare, look at results and attack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safemax_sd.commands.console import one_line_errors
from safemax_sd.commands.flags import takes
from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.options import Options, Range, option

PORT = Range("must be in 1 to 65,535", lambda value: 1 <= value <= 65_535)


@dataclass(frozen=True, kw_only=True)
class AppOptions(Options):
    """Options of `safemax app`."""

    runs_dir: str = option("runs", "Folder of the runs and of their queue.", path=True)
    host: str = option("127.0.0.1", "Address to listen at: by default, of this machine alone.")
    port: int | None = option(None, "Port; the first free one from 7860 if not given.", PORT)
    share: bool = option(False, "Open the page to the internet, through a tunnel of Gradio's servers.")


@takes(AppOptions)
def app(options: AppOptions) -> None:
    """Serve a local web page: erase words, compare pictures, look at results, attack."""
    with one_line_errors():
        options.validate()
        try:
            from safemax_sd.app.page import serve
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise SafemaxError('safemax app needs gradio: pip install "safemax_sd[app]"') from error
        serve(Path(options.runs_dir), host=options.host, port=options.port, share=options.share)
