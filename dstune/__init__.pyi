from dstune.api.models import evaluate as evaluate
from dstune.api.models import export as export
from dstune.api.models import generate as generate
from dstune.api.models import plan as plan
from dstune.api.models import predict as predict
from dstune.api.run import Run as Run
from dstune.api.run import load_run as load_run
from dstune.api.training import train as train
from dstune.errors import DstuneError as DstuneError
from dstune.errors import Preempted as Preempted
from dstune.errors import Problem as Problem
from dstune.errors import TrainingFailed as TrainingFailed
from dstune.errors import UserError as UserError
from dstune.protocols import Launcher as Launcher
from dstune.protocols import Method as Method
from dstune.protocols import Optimizer as Optimizer
from dstune.protocols import Schedule as Schedule
from dstune.protocols import Task as Task
from dstune.protocols import launcher as launcher
from dstune.protocols import method as method
from dstune.protocols import optimizer as optimizer
from dstune.protocols import schedule as schedule
from dstune.protocols import task as task

__version__: str
