"""Runs the example scripts with stand-ins for their programs, to see which commands they give."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def pipeline(tmp_path, name, **settings):
    """Run a script of ``examples`` with stand-ins, which note their arguments in ``commands`` and make its files.

    The stand-in is killed after so many commands as ``KILL_AFTER`` says, and fails at those that hold ``FAIL_AT``.
    """
    stand_in = tmp_path / "bin" / "fairdiff"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, shlex, signal, sys\n"
        "command = shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])\n"
        "with open('commands', 'a') as log: print(command, file=log)\n"
        "if os.environ.get('FAIL_AT', '<none>') in command: sys.exit('this part fails')\n"
        "folder = next((a.split('=')[1] for a in sys.argv if a.startswith('--trainer.default_root_dir=')), '.')\n"
        "for file in ('synthetic/manifest.csv', 'last.ckpt'):\n"
        "    path = pathlib.Path(folder, file); path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    path.write_text('id\\na\\n')\n"
        "if open('commands').read().count('\\n') == int(os.environ.get('KILL_AFTER', 0)):\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
    )
    (tmp_path / "bin" / "python").write_text(stand_in.read_text())
    for file in stand_in.parent.iterdir():
        file.chmod(0o755)
    (tmp_path / "examples").mkdir(exist_ok=True)
    script = tmp_path / "examples" / name
    for file in (name, "pipeline.sh"):
        (script.parent / file).write_text((REPOSITORY / "examples" / file).read_text())
    environment = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "TOTAL": "477", "STEPS": "3", **settings}
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)


def recorded(tmp_path):
    """The commands that the stand-ins noted."""
    return [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
