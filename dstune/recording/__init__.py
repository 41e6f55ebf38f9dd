"""Keep what a server with OpenAI's API knows: jobs, files, models and answers, in one folder."""
