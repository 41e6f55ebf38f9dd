"""An import that starts a thread, as libraries do."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
