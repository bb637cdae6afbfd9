{{- define "xkiproxy.fullname" -}}
{{- if contains "xkiproxy" .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-xkiproxy" (.Release.Name | trunc 36 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "xkiproxy.selector" -}}
app.kubernetes.io/name: xkiproxy
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "xkiproxy.labels" -}}
{{ include "xkiproxy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "xkiproxy.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "xkiproxy.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "xkiproxy.fullname" .) -}}
{{- end -}}

{{- /* What cannot work is refused before anything is made. */ -}}
{{- define "xkiproxy.refuse" -}}
{{- if not .Values.configuration -}}
{{- fail "configuration: give the [[kmi]] and [[keystore]] tables of xkiproxy.toml" -}}
{{- end -}}
{{- if not .Values.tls.secret -}}
{{- fail "tls.secret: name a Secret of type kubernetes.io/tls with the certificate of the proxy" -}}
{{- end -}}
{{- if not .Values.credentials.secrets -}}
{{- fail "credentials.secrets: name the Secrets that hold the access keys of the key stores, and PINs" -}}
{{- end -}}
{{- range $table := list "server" "server.tls" "server.proxy_protocol" "audit" "catalog" "log" -}}
{{- if regexMatch (printf `(?m)^\s*\[\s*%s\s*\]` (replace "." `\s*\.\s*` $table)) $.Values.configuration -}}
{{- fail (printf "configuration: the chart writes [%s] itself; use its values, serverSettings or auditSettings" $table) -}}
{{- end -}}
{{- end -}}
{{- if regexMatch `(?m)^[^#\n]*\btype"?\s*=\s*["']software["']` .Values.configuration -}}
{{- fail "configuration: type = \"software\" keeps keys in a file of one replica, and others would not have them; use pkcs11, kmip or transit" -}}
{{- end -}}
{{- if regexMatch `(?m)^[^#\n]*["']stdout["']` .Values.configuration -}}
{{- if gt (int .Values.workers) 1 -}}
{{- fail "configuration: an audit sink of type \"stdout\" needs workers: 1" -}}
{{- end -}}
{{- end -}}
{{- range $index, $kmi := rest (regexSplit `(?m)^\s*\[\[\s*kmi\s*\]\]` .Values.configuration -1) -}}
{{- $lanes := ternary 2 4 (regexMatch `(?m)^\s*type\s*=\s*["']pkcs11["']` $kmi) -}}
{{- with regexFind `(?m)^\s*lanes\s*=\s*[0-9]+` $kmi -}}
{{- $lanes = regexFind `[0-9]+` . | int -}}
{{- end -}}
{{- if lt $lanes (int $.Values.workers) -}}
{{- fail (printf "workers: each of the %d needs a lane to each KMI, and KMI number %d of configuration has %d; write lanes = %d there, or more" (int $.Values.workers) (add1 $index) $lanes (int $.Values.workers)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (not .Values.keys) -}}
{{- fail "autoscaling: list the keys in the value keys, or a new replica knows none of them" -}}
{{- end -}}
{{- end -}}

{{- define "xkiproxy.toml" -}}
[server]
listen = "0.0.0.0:8443"
admin_listen = "0.0.0.0:9464"
workers = {{ int .Values.workers }}
shutdown_delay_seconds = {{ int .Values.shutdownDelaySeconds }}
shutdown_timeout_seconds = {{ int .Values.shutdownTimeoutSeconds }}
{{- with .Values.serverSettings }}
{{ . | trim }}
{{- end }}

[server.tls]
certificate = "/run/xkiproxy/credentials/tls.crt"
private_key = { credential = "tls.key" }
{{- if .Values.tls.clientCaConfigMap }}
client_ca = "/run/xkiproxy/client-ca/ca.crt"
client_names = {{ .Values.tls.clientNames | toJson }}
{{- end }}
{{- with .Values.proxyProtocolTrusted }}

[server.proxy_protocol]
trusted = {{ . | toJson }}
{{- end }}

[catalog]
path = "/var/lib/xkiproxy/catalog.db"

[log]
level = {{ .Values.log.level | toJson }}
format = {{ .Values.log.format | toJson }}

[audit]
path = "/var/lib/xkiproxy/audit/audit.jsonl"
{{- with .Values.auditSettings }}
{{ . | trim }}
{{- end }}

{{ .Values.configuration | trim }}
{{ end -}}

{{- define "xkiproxy.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "xkiproxy.environment" -}}
- name: XKIPROXY_CONFIG
  value: /etc/xkiproxy/xkiproxy.toml
- name: CREDENTIALS_DIRECTORY
  value: /run/xkiproxy/credentials
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "xkiproxy.mounts" -}}
- name: configuration
  mountPath: /etc/xkiproxy
  readOnly: true
- name: credentials
  mountPath: /run/xkiproxy/credentials
  readOnly: true
- name: state
  mountPath: /var/lib/xkiproxy
- name: tmp
  mountPath: /tmp
{{- if .Values.tls.clientCaConfigMap }}
- name: client-ca
  mountPath: /run/xkiproxy/client-ca
  readOnly: true
{{- end }}
{{- if .Values.serviceAccount.tokenAudience }}
- name: token
  mountPath: /run/xkiproxy/token
  readOnly: true
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}
