def run(task):
    raise ValueError("out of luck")
