"""The command `jaxgpt inspect`."""

if __name__ == "inspect":
    # Python puts the folder of a script first on its path, so in all of scripts/ this file stands
    # before the standard library's module of the same name, which `dataclasses` needs.
    import os
    import sys
    from importlib import machinery, util

    here = os.path.dirname(os.path.realpath(__file__))
    elsewhere = [path for path in sys.path if os.path.realpath(path) != here]
    found = machinery.PathFinder.find_spec("inspect", elsewhere)
    assert found is not None and found.loader is not None
    sys.modules["inspect"] = module = util.module_from_spec(found)
    found.loader.exec_module(module)
else:
    from jaxgpt import config
    from jaxgpt.commands.inspect import main

    if __name__ == "__main__":
        config.exit_cleanly(main)
