"""An import after which the process opens descriptors, as if a request had left one behind."""

import os

from dstune.launch.local import fork_server

_init = fork_server.Server.__init__


def leaky(self, *arguments):
    _init(self, *arguments)
    os.dup(0)


fork_server.Server.__init__ = leaky
