"""`safemax app`: a local web page to erase, compare, look at results and attack."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from safemax_sd.commands.console import one_line_errors
from safemax_sd.commands.flags import takes
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import Options, Range, option

PORT = Range("must be in 1 to 65,535", lambda value: 1 <= value <= 65_535)
USER = "safemax"
"""User name that the page asks for beside the password."""
PASSWORD = "SAFEMAX_PASSWORD"
"""Environment variable with the page's password."""
PASSWORD_BYTES = 16
"""Random bytes in a password that is made up."""


@dataclass(frozen=True, kw_only=True)
class AppOptions(Options):
    """Options of `safemax app`."""

    runs_dir: str = option("runs", "Folder of the runs and of their queue.", path=True)
    host: str = option("127.0.0.1", "Address to listen at: by default, of this machine alone.")
    port: int | None = option(None, "Port; the first free one from 7860 if not given.", PORT)
    share: bool = option(False, "Open the page to the internet, through a tunnel of Gradio's servers.")
    password: str | None = option(
        None,
        f"Password of the page; ${PASSWORD} if not given. With neither, a page that other machines can reach gets a "
        "random one, which is printed; a local page has none.",
        secret=True,
    )

    def validate(self) -> None:
        """Check the values.

        Raises:
            OptionError: A value cannot be used.
        """
        super().validate()
        if self.password == "":
            raise OptionError("--password", "(empty)", "must not be empty: leave it out for none or a random one")

    @property
    def local(self) -> bool:
        """True if only this machine can reach the page."""
        return not self.share and _is_loopback(self.host)


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
        auth = sign_in(options)
        serve(Path(options.runs_dir), host=options.host, port=options.port, share=options.share, auth=auth)


def sign_in(options: AppOptions) -> tuple[str, str] | None:
    """Return the user name and the password that the page asks for; None for none.

    A page that other machines can reach always has a password. If none is given, a random one is made up and printed.
    """
    given = options.password or os.environ.get(PASSWORD)
    if given:
        return USER, given
    if options.local:
        return None
    password = secrets.token_urlsafe(PASSWORD_BYTES)
    print(f"sign in as {USER} with the password {password}", flush=True)
    return USER, password


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
