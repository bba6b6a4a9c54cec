# Where

variable "project_id" {
  description = "Id of the Google Cloud project, which has billing. Everything is made in it."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "A project id has 6 to 30 lower-case letters, digits and hyphens, and begins with a letter."
  }
}

variable "region" {
  description = "Region of the functions, the job, the images and, unless said otherwise, of all data. With gpu, one that has the GPU."
  type        = string
  default     = "us-central1"

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "A region's name looks like us-central1."
  }
}

variable "gateway_region" {
  description = "Region of the API gateway; null is `region`. API Gateway is in fewer of them."
  type        = string
  default     = null

  validation {
    condition     = var.gateway_region == null || can(regex("^[a-z]+-[a-z]+[0-9]+$", var.gateway_region))
    error_message = "A region's name looks like us-central1."
  }
}

variable "build_region" {
  description = "Region of the builds; null is `region`. A new project may not build in every one."
  type        = string
  default     = null

  validation {
    condition     = var.build_region == null || can(regex("^([a-z]+-[a-z]+[0-9]+|global)$", var.build_region))
    error_message = "A region's name looks like us-central1, or is global."
  }
}

variable "labels" {
  description = "Labels of everything that can have some, besides `app`."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for name, value in var.labels : can(regex("^[a-z][a-z0-9_-]{0,62}$", name)) && can(regex("^[a-z0-9_-]{0,63}$", value))])
    error_message = "Labels have lower-case letters, digits, _ and -, at most 63, and names begin with a letter."
  }
}

# Data

variable "bucket_name" {
  description = "Name of the artifact bucket, unique in the world; null is PROJECT_ID-gemma-export."
  type        = string
  default     = null

  validation {
    condition     = var.bucket_name == null || can(regex("^[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]$", var.bucket_name))
    error_message = "A bucket's name has 3 to 63 lower-case letters, digits, - and _, and begins and ends with a letter or digit."
  }
}

variable "bucket_location" {
  description = "Location of the artifact bucket; null is `region`, where transfers to the job cost nothing."
  type        = string
  default     = null

  validation {
    condition     = var.bucket_location == null || can(regex("^[A-Za-z0-9-]+$", var.bucket_location))
    error_message = "A location is a region (us-central1), a dual-region (nam4) or a multi-region (us)."
  }
}

variable "adapter_sources" {
  description = "Where training jobs keep their adapters, gs://BUCKET or gs://BUCKET/PREFIX, besides adapters/ in the artifact bucket. Such a bucket has uniform access, and whoever applies may say who reads it; it is listed as a whole."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for source in var.adapter_sources : can(regex("^gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[^\"\\\\*?\\[\\]]+)?$", source))])
    error_message = "An adapter source is gs://BUCKET or gs://BUCKET/PREFIX, without wildcards."
  }
}

variable "create_firestore_database" {
  description = "Whether to make the Firestore database; false where the training service has made it already."
  type        = bool
  default     = true
}

variable "firestore_database" {
  description = "Id of the Firestore database (native mode) that has the training jobs, and gets the exports."
  type        = string
  default     = "(default)"

  validation {
    condition     = var.firestore_database == "(default)" || can(regex("^[a-z][a-z0-9-]{2,61}[a-z0-9]$", var.firestore_database))
    error_message = "A database id is (default), or 4 to 63 lower-case letters, digits and hyphens that begin with a letter."
  }
}

variable "firestore_location" {
  description = "Location of the database, which can never be changed; null is `region`."
  type        = string
  default     = null

  validation {
    condition     = var.firestore_location == null || can(regex("^[a-z0-9-]+$", var.firestore_location))
    error_message = "A location is a region (us-central1) or a multi-region (nam5, eur3)."
  }
}

variable "deletion_protection" {
  description = "Whether `terraform destroy` refuses to delete the database, and the bucket while it has objects."
  type        = bool
  default     = true
}

# The job

variable "gpu" {
  description = "Whether the job has a GPU. Only the engine `unsloth` uses it: merging and quantizing need none, so false gives the cheaper lane."
  type        = bool
  default     = true
}

variable "gpu_type" {
  description = "Which GPU, with `gpu`."
  type        = string
  default     = "nvidia-l4"

  validation {
    condition     = contains(["nvidia-l4", "nvidia-rtx-pro-6000"], var.gpu_type)
    error_message = "Cloud Run has nvidia-l4 and nvidia-rtx-pro-6000."
  }
}

variable "exporter_cpu" {
  description = "How many CPUs a task has."
  type        = number
  default     = 4

  validation {
    condition     = contains([1, 2, 4, 6, 8, 20, 22, 24, 26, 28, 30], var.exporter_cpu)
    error_message = "Cloud Run gives a task 1, 2, 4, 6 or 8 CPUs, and 20 to 30 with an nvidia-rtx-pro-6000."
  }

  validation {
    condition     = var.exporter_cpu <= 8 || (var.gpu && var.gpu_type == "nvidia-rtx-pro-6000")
    error_message = "A task has at most 8 CPUs, unless it has an nvidia-rtx-pro-6000."
  }

  validation {
    condition     = !var.gpu || var.exporter_cpu >= (var.gpu_type == "nvidia-l4" ? 4 : 20)
    error_message = "With an nvidia-l4 a task has at least 4 CPUs, with an nvidia-rtx-pro-6000 at least 20."
  }
}

variable "exporter_memory_gib" {
  description = "Memory of a task in GiB. What it writes to its disk counts. The reference engines hold the whole model: 2 GiB per billion parameters, and as much again."
  type        = number
  default     = 16

  validation {
    condition     = var.exporter_memory_gib >= 2 && var.exporter_memory_gib == floor(var.exporter_memory_gib)
    error_message = "A task has a whole number of GiB, at least 2."
  }

  validation {
    condition     = !var.gpu || var.exporter_memory_gib >= (var.gpu_type == "nvidia-l4" ? 16 : 80)
    error_message = "With an nvidia-l4 a task has at least 16 GiB, with an nvidia-rtx-pro-6000 at least 80."
  }

  validation {
    condition     = var.exporter_memory_gib <= 32 || (var.gpu && var.gpu_type == "nvidia-rtx-pro-6000")
    error_message = "A task has at most 32 GiB, unless it has an nvidia-rtx-pro-6000."
  }

  validation {
    condition     = var.exporter_memory_gib <= 4 * var.exporter_cpu || var.exporter_memory_gib <= 8 && var.exporter_cpu >= 2
    error_message = "Cloud Run wants 2 CPUs for 8 GiB, 4 for 16 and 8 for 32 (exporter_cpu)."
  }
}

variable "memory_budget_mib" {
  description = "What an export may take beyond Python and its libraries (MEMORY_BUDGET_MIB): more lets more shards go side by side."
  type        = number
  default     = 4096

  validation {
    condition     = var.memory_budget_mib >= 64 && var.memory_budget_mib == floor(var.memory_budget_mib)
    error_message = "The budget is a whole number of MiB, at least 64."
  }

  validation {
    condition     = var.memory_budget_mib <= (var.exporter_memory_gib - 1.5) * 1024
    error_message = "Of a task's memory (exporter_memory_gib), 1.5 GiB are for Python, its libraries and the tokenizer: lower the budget."
  }
}

variable "task_timeout_seconds" {
  description = "How long one attempt of a task may take, in seconds. One that is ended goes on where it was."
  type        = number
  default     = 3600

  validation {
    condition     = var.task_timeout_seconds >= 300 && var.task_timeout_seconds <= 86400 && var.task_timeout_seconds == floor(var.task_timeout_seconds)
    error_message = "A task has 300 to 86400 whole seconds."
  }

  validation {
    condition     = !var.gpu || var.task_timeout_seconds <= 3600
    error_message = "With a GPU a task has at most an hour."
  }
}

variable "parallelism" {
  description = "How many tasks of one execution run at once. The trigger starts up to four for a large base; a new project has three GPUs."
  type        = number
  default     = 3

  validation {
    condition     = var.parallelism >= 1 && var.parallelism <= 100 && var.parallelism == floor(var.parallelism)
    error_message = "A whole number from 1 to 100."
  }
}

variable "max_attempts" {
  description = "How often an export is tried (MAX_ATTEMPTS); the job's own retries are one less."
  type        = number
  default     = 4

  validation {
    condition     = var.max_attempts >= 1 && var.max_attempts <= 11 && var.max_attempts == floor(var.max_attempts)
    error_message = "An export is tried 1 to 11 times: Cloud Run retries a task at most 10 times."
  }
}

variable "engine" {
  description = "What merges (ENGINE)."
  type        = string
  default     = "auto"

  validation {
    condition     = contains(["auto", "streaming", "peft", "unsloth"], var.engine)
    error_message = "An engine is auto, streaming, peft or unsloth."
  }

  validation {
    condition     = var.engine != "unsloth" || var.gpu
    error_message = "The image of the CPU lane has no Unsloth: take gpu = true, or another engine."
  }
}

variable "base_cache" {
  description = "Whether bases from the hub are kept in the bucket (BASE_CACHE)."
  type        = bool
  default     = true
}

variable "verify_logits" {
  description = "Whether a merged model's logits are compared, where the memory budget holds the model (VERIFY_LOGITS)."
  type        = bool
  default     = true
}

variable "hf_token_secret" {
  description = "Id of a secret in this project with the deployment's own Hugging Face token, for bases behind a gate; null is none."
  type        = string
  default     = null

  validation {
    condition     = var.hf_token_secret == null || can(regex("^[A-Za-z0-9_-]{1,255}$", var.hf_token_secret))
    error_message = "A secret's id has letters, digits, _ and -."
  }

  validation {
    condition     = var.hf_token_secret == null || !startswith(coalesce(var.hf_token_secret, "-"), "gemma-export-")
    error_message = "Secrets that begin with gemma-export- are those of single exports: name it otherwise."
  }
}

# The functions

variable "max_instances" {
  description = "The most instances of each function."
  type        = number
  default     = 20

  validation {
    condition     = var.max_instances >= 1 && var.max_instances <= 100 && var.max_instances == floor(var.max_instances)
    error_message = "A function has 1 to 100 instances, a whole number."
  }
}

variable "max_unfinished_per_user" {
  description = "How many unfinished exports a user may have (MAX_UNFINISHED_PER_USER)."
  type        = number
  default     = 20

  validation {
    condition     = var.max_unfinished_per_user >= 1 && var.max_unfinished_per_user == floor(var.max_unfinished_per_user)
    error_message = "A user may have at least one unfinished export, and a whole number of them."
  }
}

variable "lease_seconds" {
  description = "How long a dead holder keeps an export (LEASE_SECONDS)."
  type        = number
  default     = 120

  validation {
    condition     = var.lease_seconds >= 30 && var.lease_seconds <= 600 && var.lease_seconds == floor(var.lease_seconds)
    error_message = "A lease lasts 30 to 600 whole seconds: shorter, and a slow heartbeat loses it; longer, and deliveries end before it does."
  }
}

variable "clock_skew_seconds" {
  description = "The most that the clocks of two machines differ (CLOCK_SKEW_SECONDS)."
  type        = number
  default     = 120

  validation {
    condition     = var.clock_skew_seconds >= 0 && var.clock_skew_seconds <= 600 && var.clock_skew_seconds == floor(var.clock_skew_seconds)
    error_message = "Clocks differ by 0 to 600 whole seconds."
  }
}

variable "collect_after_days" {
  description = "How long older versions and abandoned attempts are kept (COLLECT_AFTER_SECONDS)."
  type        = number
  default     = 7

  validation {
    condition     = var.collect_after_days >= 1 && var.collect_after_days <= 365 && var.collect_after_days == floor(var.collect_after_days)
    error_message = "They are kept for 1 to 365 whole days."
  }
}

variable "download_url_seconds" {
  description = "How long the download URLs in a status answer are good (DOWNLOAD_URL_SECONDS)."
  type        = number
  default     = 3600

  validation {
    condition     = var.download_url_seconds >= 60 && var.download_url_seconds <= 43200 && var.download_url_seconds == floor(var.download_url_seconds)
    error_message = "A download URL is good for 60 to 43200 whole seconds."
  }
}

variable "message_retention_days" {
  description = "How far back messages can be replayed. A caller's Hugging Face token lives as long (TOKEN_TTL_SECONDS), unless its export ends before."
  type        = number
  default     = 7

  validation {
    condition     = var.message_retention_days >= 1 && var.message_retention_days <= 31 && var.message_retention_days == floor(var.message_retention_days)
    error_message = "Pub/Sub keeps messages for 1 to 31 whole days."
  }
}

# Who may call

variable "jwt_issuer" {
  description = "Issuer (`iss`) of the callers' JWTs; null is Firebase Authentication in this project."
  type        = string
  default     = null

  validation {
    condition     = var.jwt_issuer == null || can(regex("^https://[^\\s\"]+$", var.jwt_issuer))
    error_message = "An issuer is an https URL."
  }

  validation {
    condition     = (var.jwt_issuer == null) == (var.jwt_jwks_url == null) && (var.jwt_issuer == null) == (var.jwt_audience == null)
    error_message = "jwt_issuer, jwt_jwks_url and jwt_audience go together."
  }
}

variable "jwt_jwks_url" {
  description = "Where that issuer publishes its keys, as a JSON Web Key Set."
  type        = string
  default     = null

  validation {
    condition     = var.jwt_jwks_url == null || can(regex("^https://[^\\s\"]+$", var.jwt_jwks_url))
    error_message = "The key set is at an https URL."
  }
}

variable "jwt_audience" {
  description = "Audience (`aud`) of the callers' JWTs."
  type        = string
  default     = null

  validation {
    condition     = var.jwt_audience == null || can(regex("^[^\\s,\"]+$", var.jwt_audience))
    error_message = "An audience has no spaces, commas or quotes."
  }
}

variable "check_jwt" {
  description = "Whether the dispatcher checks the caller's JWT too, besides the gateway (JWT_ISSUER, JWT_AUDIENCE, JWT_JWKS_URL)."
  type        = bool
  default     = true
}

# Watching

variable "alert_emails" {
  description = "Who gets the alerts by mail."
  type        = set(string)
  default     = []

  validation {
    condition     = alltrue([for address in var.alert_emails : can(regex("^[^@\\s]+@[^@\\s]+$", address))])
    error_message = "These are mail addresses."
  }
}

variable "notification_channels" {
  description = "Notification channels that exist already, by full name, for the alerts; the budget mails to alert_emails alone."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for channel in var.notification_channels : can(regex("^projects/[^/]+/notificationChannels/[0-9]+$", channel))])
    error_message = "A channel is projects/PROJECT/notificationChannels/NUMBER."
  }
}

variable "failed_exports_per_hour" {
  description = "So many exports that fail within an hour, for whatever reason, raise an alert. One that fails for a passing fault always does."
  type        = number
  default     = 10

  validation {
    condition     = var.failed_exports_per_hour >= 1 && var.failed_exports_per_hour == floor(var.failed_exports_per_hour)
    error_message = "A whole number, at least 1."
  }
}

variable "oldest_queued_minutes" {
  description = "An export that waits longer than that for its execution raises an alert."
  type        = number
  default     = 30

  validation {
    condition     = var.oldest_queued_minutes >= 10 && var.oldest_queued_minutes == floor(var.oldest_queued_minutes)
    error_message = "At least 10 whole minutes: the sweep looks every five."
  }
}

variable "budget_amount" {
  description = "What the project is meant to cost a month, in the billing account's currency; mails go out at half, at 90 % and at all of it. 0 makes no budget, which needs no permission on the billing account."
  type        = number
  default     = 100

  validation {
    condition     = var.budget_amount >= 0 && var.budget_amount == floor(var.budget_amount)
    error_message = "A whole number, not negative."
  }
}

variable "billing_account" {
  description = "Id of the billing account that the budget is of; null is the project's."
  type        = string
  default     = null

  validation {
    condition     = var.billing_account == null || can(regex("^[0-9A-F]{6}-[0-9A-F]{6}-[0-9A-F]{6}$", var.billing_account))
    error_message = "A billing account looks like 012345-6789AB-CDEF01."
  }
}
